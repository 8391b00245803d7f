"""Which pairs make up each optimizer step, and how a step is cut into micro-batches: pure functions of the seed.

The pairs of a step are drawn at random from (seed, epoch, position): same order for any number of processes, resumable from
two integers. Only INSIDE a step are pairs grouped by length, so padding goes and the trajectory stays that of plain
sampling.
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
    """The last so many micro-batches are fillers with weight 0: every process runs equally many, as sharding needs."""
    rows: tuple[int, ...]
    """Rows of the whole step, over all processes."""


def epoch_order(n_rows: int, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """A permutation of 0 … n_rows-1, the same on every process and in every run with this seed and epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n_rows) if shuffle else np.arange(n_rows)


def group_by_length(rows: Sequence[int], lengths: Sequence[int], tokens_per_micro_batch: int) -> list[list[int]]:
    """Cut rows into groups of similar length whose padded size (rows × longest) stays within a token budget.

    A single row longer than the budget makes a group of its own.

    >>> group_by_length([0, 1, 2, 3], [10, 2, 9, 3], 20)
    [[0, 2], [3, 1]]
    """
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(rows, key=lambda r: (-lengths[r], r)):
        if not groups or (len(groups[-1]) + 1) * longest > tokens_per_micro_batch:
            groups.append([])
            longest = lengths[row]
        groups[-1].append(row)
    return groups


def plan_step(
    rows: Sequence[int], lengths: Sequence[int], *, tokens_per_micro_batch: int, rank: int = 0, world_size: int = 1
) -> StepPlan:
    """Split a step's rows over processes and micro-batches.

    Rows are sorted by length and dealt like cards, so that every process gets about the same number of tokens; each
    process groups its own. Processes with fewer micro-batches than the busiest one repeat their first row, weightless.
    """
    by_length = sorted(rows, key=lambda r: (-lengths[r], r))
    shares = [group_by_length(by_length[r::world_size], lengths, tokens_per_micro_batch) for r in range(world_size)]
    own = [tuple(group) for group in shares[rank]]
    n_fillers = max(len(share) for share in shares) - len(own)
    shortest = by_length[-1]
    return StepPlan(tuple(own) + ((shortest,),) * n_fillers, n_fillers, tuple(rows))


class StepSampler(Sampler[StepPlan]):
    """Yields one :class:`StepPlan` per optimizer step of an epoch.

    Args:
        lengths: row length of each pair in the layout that is trained, in tokens.
        pairs_per_step: pairs of one optimizer step over all processes; the last step of an epoch holds the rest.
        tokens_per_micro_batch: padded tokens of one forward pass on one process.
        start_step: steps of the first epoch to skip, to resume inside it.
        rows: only these rows, default all.
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
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation (Lightning calls this at each epoch's start)."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Optimizer steps of a whole epoch."""
        return -(-len(self.rows) // self.pairs_per_step)

    def order(self) -> np.ndarray:
        """Rows of the current epoch in the order in which steps take them."""
        order: np.ndarray = self.rows[
            epoch_order(len(self.rows), seed=self.seed, epoch=self.epoch, shuffle=self.shuffle)
        ]
        return order

    def __iter__(self) -> Iterator[StepPlan]:
        """Steps of the current epoch in order."""
        order = self.order().tolist()
        start, self.start_step = self.start_step, 0
        for at in range(start * self.pairs_per_step, len(order), self.pairs_per_step):
            yield plan_step(
                order[at : at + self.pairs_per_step],
                self.lengths,
                tokens_per_micro_batch=self.tokens_per_micro_batch,
                rank=self.rank,
                world_size=self.world_size,
            )
