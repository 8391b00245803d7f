"""Chooses the pairs of each optimizer step and cuts it into micro-batches: pure functions of the seed.

The pairs of a step are drawn at random from (seed, epoch, position): same order for any number of processes, resumable from
two integers. Only INSIDE a step are pairs grouped by length or packed, so padding goes and the trajectory stays that of
plain sampling; grouping across steps is an option (``bucket_steps``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class StepPlan:
    """The part of one optimizer step that one process computes."""

    micro_batches: tuple[tuple[int, ...], ...]
    """Data-set rows of each micro-batch."""
    n_fillers: int
    """Number of fillers of weight 0 at the end of the micro-batches: every process runs equally many, as sharding needs."""
    rows: tuple[int, ...]
    """Rows of the whole step, over all processes."""


def epoch_order(n_rows: int, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """A permutation of 0 … n_rows-1, the same on every process and in every run with this seed and epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n_rows) if shuffle else np.arange(n_rows)


MICRO_BATCH_COST = 64
"""Cost of one more micro-batch, in tokens: below this much padding, cutting once more doesn't pay."""


def group_by_length(rows: Sequence[int], lengths: Sequence[int], tokens_per_micro_batch: int) -> list[list[int]]:
    """Cut rows, sorted by length, into groups whose padded size (rows × longest) stays within a token budget.

    Of all cuts the one with the least padded tokens is taken, counting :data:`MICRO_BATCH_COST` per group (dynamic
    programming over the sorted rows). A single row longer than the budget makes a group of its own.

    >>> group_by_length([0, 1, 2, 3], [100, 12, 90, 13], 200)
    [[0, 2], [3, 1]]
    """
    order = sorted(rows, key=lambda r: (-lengths[r], r))
    best = [(0, 0)]  # (cost of the first n rows, where their last group starts)
    for end in range(1, len(order) + 1):
        choices = []
        for start in range(end - 1, -1, -1):
            size = (end - start) * lengths[order[start]]
            if size > tokens_per_micro_batch and end - start > 1:
                break
            choices.append((best[start][0] + size + MICRO_BATCH_COST, start))
        best.append(min(choices))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def fill_rows(rows: Sequence[int], lengths: Sequence[int], tokens_per_micro_batch: int) -> list[list[int]]:
    """Pack rows into groups whose summed length stays within a token budget: the longest first, each where it still fits.

    >>> fill_rows([0, 1, 2, 3], [100, 12, 90, 13], 120)
    [[0, 3], [2, 1]]
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda r: (-lengths[r], r)):
        place = next((i for i, left in enumerate(room) if left >= lengths[row]), len(groups))
        if place == len(groups):
            groups.append([])
            room.append(tokens_per_micro_batch)
        groups[place].append(row)
        room[place] -= lengths[row]
    return groups


def plan_step(
    rows: Sequence[int],
    lengths: Sequence[int],
    *,
    tokens_per_micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    packed: bool = False,
) -> StepPlan:
    """Split a step's rows over processes and micro-batches.

    Rows are sorted by length and dealt like cards, so that every process gets about the same number of tokens; each
    process groups its own. Processes with fewer micro-batches than the busiest one repeat their shortest row, weightless.
    """
    by_length = sorted(rows, key=lambda r: (-lengths[r], r))
    group = fill_rows if packed else group_by_length
    shares = [group(by_length[r::world_size], lengths, tokens_per_micro_batch) for r in range(world_size)]
    own = [tuple(group) for group in shares[rank]]
    n_fillers = max(len(share) for share in shares) - len(own)
    shortest = by_length[-1]
    return StepPlan(tuple(own) + ((shortest,),) * n_fillers, n_fillers, tuple(rows))


def bucketed_order(
    order: np.ndarray, lengths: Sequence[int], *, pairs_per_step: int, bucket_steps: int, seed: int, epoch: int
) -> np.ndarray:
    """An order that makes steps of similar length.

    The pairs of ``bucket_steps`` consecutive steps are sorted by length and cut into steps anew, which are then shuffled among
    themselves; a last, incomplete step stays the last.

    >>> bucketed_order(np.arange(4), [9, 1, 8, 2], pairs_per_step=2, bucket_steps=2, seed=0, epoch=0).tolist()
    [2, 0, 1, 3]
    """
    rng = np.random.default_rng((seed, epoch, 1))
    lengths_of = np.asarray(lengths)
    taken = []
    for at in range(0, len(order), bucket_steps * pairs_per_step):
        bucket = order[at : at + bucket_steps * pairs_per_step]
        bucket = bucket[np.argsort(lengths_of[bucket], kind="stable")]
        n_whole = len(bucket) // pairs_per_step
        steps = [bucket[i * pairs_per_step : (i + 1) * pairs_per_step] for i in rng.permutation(n_whole)]
        taken += [*steps, bucket[n_whole * pairs_per_step :]]
    return np.concatenate(taken)


class StepSampler(Sampler[StepPlan]):
    """Yields one :class:`StepPlan` per optimizer step of an epoch.

    Args:
        lengths: row length of each pair in the layout that is trained, in tokens.
        pairs_per_step: pairs of one optimizer step over all processes; the last step of an epoch holds the rest.
        tokens_per_micro_batch: padded tokens of one forward pass on one process.
        start_step: steps of the first epoch to skip, to resume inside it.
        rows: only these rows, default all.
        packed: micro-batches are packed rows rather than padded ones.
        bucket_steps: steps whose pairs are sorted by length together (:func:`bucketed_order`); 1: plain sampling.
        bucket_lengths: lengths that buckets are sorted by, the same for every layout; default ``lengths``.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        pairs_per_step: int,
        tokens_per_micro_batch: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        rows: Sequence[int] | None = None,
        packed: bool = False,
        bucket_steps: int = 1,
        bucket_lengths: Sequence[int] | None = None,
    ) -> None:
        self.lengths = lengths
        self.pairs_per_step = pairs_per_step
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step
        self.rows = np.arange(len(lengths)) if rows is None else np.asarray(rows, dtype=np.int64)
        self.packed = packed
        self.bucket_steps = bucket_steps
        self.bucket_lengths = lengths if bucket_lengths is None else bucket_lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation (Lightning calls this at each epoch's start)."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Optimizer steps of a whole epoch."""
        return -(-len(self.rows) // self.pairs_per_step)

    def order(self, epoch: int) -> np.ndarray:
        """Rows of an epoch in the order in which steps take them."""
        order: np.ndarray = self.rows[epoch_order(len(self.rows), seed=self.seed, epoch=epoch, shuffle=self.shuffle)]
        if self.bucket_steps == 1:
            return order
        return bucketed_order(
            order,
            self.bucket_lengths,
            pairs_per_step=self.pairs_per_step,
            bucket_steps=self.bucket_steps,
            seed=self.seed,
            epoch=epoch,
        )

    def __iter__(self) -> Iterator[StepPlan]:
        """Steps of the current epoch in order."""
        order = self.order(self.epoch).tolist()
        start, self.start_step = self.start_step, 0
        for at in range(start * self.pairs_per_step, len(order), self.pairs_per_step):
            yield plan_step(
                order[at : at + self.pairs_per_step],
                self.lengths,
                tokens_per_micro_batch=self.tokens_per_micro_batch,
                rank=self.rank,
                world_size=self.world_size,
                packed=self.packed,
            )
