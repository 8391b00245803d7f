"""Batches of preferences: pairs of responses laid out as rows of tokens, with every shape stated once.

Two layouts give the same log-probabilities. ``concatenated`` is the plain one, two rows a pair::

    [prompt | chosen]            positions 0 … P+C-1
    [prompt | rejected]          positions 0 … P+R-1

``shared_prefix`` computes the prompt once, one row a pair::

    [prompt | chosen | rejected] positions 0 … P-1, P … P+C-1, P … P+R-1

where rejected tokens cannot see chosen tokens and positions restart after the prompt (the idea of arXiv 2410.20305).
The last prompt token predicts the first token of both responses, so no token is repeated. ``chosen_only`` is
``concatenated`` without the rejected rows, for supervised fine-tuning.

Rows are padded to the longest; or *packed*, all of them behind one another in one row without padding
(:mod:`tiltmeter.pairs.packing`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiltmeter.pairs.packing import Packing

Layout = Literal["shared_prefix", "concatenated", "chosen_only"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

PAD, PROMPT, CHOSEN, REJECTED = 0, 1, 2, 3
"""Values of ``PreferenceBatch.segments``. Padding is known by segment, never by token id."""


class TokenizedPair(NamedTuple):
    """Token ids of one pair; prompt and responses were tokenised apart, so the prompt is a prefix of both by construction."""

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]


@dataclass(frozen=True, eq=False)
class PreferenceBatch:
    """Pairs as rows of tokens, and the list of the token predictions that count.

    A *target* is one token whose log-probability is wanted: it is predicted by the hidden state at
    ``target_rows`` (an index into the flattened rows) and belongs to sequence ``target_sequences``. Sequences are
    numbered chosen 0 … B-1, then rejected B … 2B-1 (``chosen_only``: 0 … B-1).
    """

    input_ids: Int[Tensor, "row token"]
    position_ids: Int[Tensor, "row token"]
    segments: Int[Tensor, "row token"]
    target_rows: Int[Tensor, " target"]
    target_ids: Int[Tensor, " target"]
    target_sequences: Int[Tensor, " target"]
    pair_index: Int[Tensor, " pair"]
    """Row of the data set that each pair came from: the key of cached reference log-probs."""
    weights: Float[Tensor, " pair"]
    """1 for a real pair; 0 for one that only fills a rank's schedule and counts nowhere."""
    layout: Layout
    packing: Packing | None = None
    """Places of the pairs in the one row of a packed batch; None: padded rows."""

    @property
    def n_pairs(self) -> int:
        """Pairs in this batch, fillers included."""
        return len(self.pair_index)

    @property
    def n_sequences(self) -> int:
        """Responses in this batch: two a pair, or one for ``chosen_only``."""
        return self.n_pairs if self.layout == "chosen_only" else 2 * self.n_pairs

    @property
    def n_padding(self) -> int:
        """Tokens that are padding or belong to fillers (a micro-batch of fillers holds nothing else)."""
        return int((self.segments == PAD).sum()) if self.weights.any() else self.segments.numel()

    @property
    def target_counts(self) -> Int[Tensor, " sequence"]:
        """Number of predicted tokens of each sequence."""
        return torch.bincount(self.target_sequences, minlength=self.n_sequences)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PreferenceBatch":
        """Copy the batch to another device (Lightning calls this)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PreferenceBatch":
        """Copy the batch to page-locked memory (the DataLoader calls this)."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PreferenceBatch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


class StepBatch:
    """All pairs of one optimizer step that this process computes, split into micro-batches.

    Not a dataclass on purpose: Lightning's half and double precision would look inside one and convert it.

    Args:
        micro_batches: what this process computes, fillers included.
        n_pairs: real pairs of the step over ALL processes: gradients are divided by it.
        n_targets: target tokens of those pairs (the divisor of supervised fine-tuning).
        n_tokens: tokens of those pairs, each prompt counted once, no padding: the useful work.
        n_prompt_tokens: tokens of their prompts, each counted once.
    """

    def __init__(
        self,
        micro_batches: list[PreferenceBatch],
        *,
        n_pairs: int,
        n_targets: int,
        n_tokens: int,
        n_prompt_tokens: int,
        n_computed: int | None = None,
        n_padding: int | None = None,
    ) -> None:
        self.micro_batches = micro_batches
        self.n_pairs = n_pairs
        self.n_targets = n_targets
        self.n_tokens = n_tokens
        self.n_prompt_tokens = n_prompt_tokens
        # counted while the micro-batches are on the host
        self.n_computed = sum(m.segments.numel() for m in micro_batches) if n_computed is None else n_computed
        """Tokens that this process computes, padding and fillers included."""
        self.n_padding = sum(m.n_padding for m in micro_batches) if n_padding is None else n_padding
        """Computed tokens that are padding or belong to a filler."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "StepBatch":
        """Copy the step to another device."""
        return self._with([m.to(device, non_blocking=non_blocking) for m in self.micro_batches])

    def pin_memory(self) -> "StepBatch":
        """Copy the step to page-locked memory."""
        return self._with([m.pin_memory() for m in self.micro_batches])

    def _with(self, micro_batches: list[PreferenceBatch]) -> "StepBatch":
        counts = {name: value for name, value in vars(self).items() if name != "micro_batches"}
        return StepBatch(micro_batches, **counts)


def row_length(pair: TokenizedPair, layout: Layout) -> int:
    """Tokens of the longest row that a pair takes in a layout."""
    prompt, chosen, rejected = (len(ids) for ids in pair)
    if layout == "shared_prefix":
        return prompt + chosen + rejected
    return prompt + (chosen if layout == "chosen_only" else max(chosen, rejected))


def packed_length(pair: TokenizedPair, layout: Layout) -> int:
    """Tokens that a pair takes in a packed row."""
    prompt, chosen, rejected = (len(ids) for ids in pair)
    if layout == "concatenated":
        return 2 * prompt + chosen + rejected
    return row_length(pair, layout)


def collate_pairs(
    pairs: Sequence[TokenizedPair],
    *,
    pair_index: Sequence[int],
    layout: Layout = "shared_prefix",
    weights: Sequence[float] | None = None,
    pad_id: int = 0,
    predict_prompt: bool = False,
    packed: bool = False,
) -> PreferenceBatch:
    """Lay pairs out as one batch.

    Args:
        pairs: B tokenised pairs; prompts and responses hold at least one token.
        pair_index: B data-set rows.
        layout: see the module's head.
        weights: B weights, default 1.
        pad_id: token id written into padding; its value has no effect on any result.
        predict_prompt: also count the prompt's own tokens (from the second) as targets of the chosen sequence;
            only for ``chosen_only``.
        packed: all rows behind one another in one, instead of padded to the longest.

    Raises:
        ValueError: an empty prompt or response, or ``predict_prompt`` with another layout.

    >>> batch = collate_pairs([TokenizedPair([1, 5], [6, 2], [7, 8, 2])], pair_index=[0])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[1, 5, 6, 2, 7, 8, 2]], [[0, 1, 2, 3, 2, 3, 4]])
    >>> batch.target_rows.tolist(), batch.target_ids.tolist(), batch.target_sequences.tolist()
    ([1, 2, 1, 4, 5], [6, 2, 7, 8, 2], [0, 0, 1, 1, 1])
    """
    if not all(map(len, chain.from_iterable(pairs))):
        raise ValueError(
            "collate_pairs: expected at least one token in every prompt, chosen and rejected, got an empty one"
        )
    if predict_prompt and layout != "chosen_only":
        raise ValueError(f"collate_pairs: predict_prompt needs layout chosen_only, got {layout}")
    n = len(pairs)
    rows = [row for i, pair in enumerate(pairs) for row in _rows_of_pair(pair, i, n, layout, predict_prompt)]
    rows = _in_order_of_sequences(rows, layout)
    packing = Packing(tuple(row.parts for row in rows)) if packed else None
    if packed:
        rows = [_join(rows)]
    width = max(len(row.ids) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([list(getattr(r, name)) + [fill] * (width - len(r.ids)) for r in rows], dtype=torch.long)

    targets = [(i * width + at, token, seq) for i, row in enumerate(rows) for at, token, seq in row.targets]
    target_rows, target_ids, target_sequences = torch.tensor(targets, dtype=torch.long).unbind(1)
    return PreferenceBatch(
        input_ids=padded("ids", pad_id),
        position_ids=padded("positions", 0),
        segments=padded("segments", PAD),
        target_rows=target_rows,
        target_ids=target_ids,
        target_sequences=target_sequences,
        pair_index=torch.tensor(pair_index, dtype=torch.long),
        weights=torch.ones(n) if weights is None else torch.tensor(weights, dtype=torch.float32),
        layout=layout,
        packing=packing,
    )


class _Row(NamedTuple):
    ids: list[int]
    positions: list[int]
    segments: list[int]
    targets: list[tuple[int, int, int]]
    """(place in the row of the hidden state that predicts, token, sequence)"""
    parts: tuple[int, ...]
    """Tokens of the prompt and of each response."""


def _in_order_of_sequences(rows: list[_Row], layout: Layout) -> list[_Row]:
    """All chosen rows first where a pair has two, as sequences are numbered."""
    return rows[0::2] + rows[1::2] if layout == "concatenated" else rows


def _join(rows: list[_Row]) -> _Row:
    """Lay all rows behind one another."""
    starts = accumulate((len(row.ids) for row in rows[:-1]), initial=0)
    targets = [(start + at, *rest) for start, row in zip(starts, rows, strict=True) for at, *rest in row.targets]
    ids, positions, segments = ([x for row in rows for x in row[i]] for i in range(3))
    return _Row(ids, positions, segments, targets, ())  # type: ignore[arg-type]


def _rows_of_pair(pair: TokenizedPair, i: int, n_pairs: int, layout: Layout, predict_prompt: bool) -> list[_Row]:
    prompt, chosen, rejected = (list(ids) for ids in pair)
    p, c, r = len(prompt), len(chosen), len(rejected)

    def response(ids: list[int], start: int, sequence: int) -> list[tuple[int, int, int]]:
        """The first token is predicted by the prompt's last place, the next ones by the response's own places."""
        return [(p - 1 if t == 0 else start + t - 1, token, sequence) for t, token in enumerate(ids)]

    def plain(ids: list[int], kind: int, sequence: int) -> _Row:
        segments = [PROMPT] * p + [kind] * len(ids)
        return _Row(prompt + ids, list(range(p + len(ids))), segments, response(ids, p, sequence), (p, len(ids)))

    if layout == "shared_prefix":
        positions = [*range(p + c), *range(p, p + r)]
        targets = response(chosen, p, i) + response(rejected, p + c, n_pairs + i)
        segments = [PROMPT] * p + [CHOSEN] * c + [REJECTED] * r
        return [_Row(prompt + chosen + rejected, positions, segments, targets, (p, c, r))]
    if layout == "concatenated":
        return [plain(chosen, CHOSEN, i), plain(rejected, REJECTED, n_pairs + i)]
    row = plain(chosen, CHOSEN, i)
    if predict_prompt:
        own = [(t - 1, token, i) for t, token in enumerate(prompt) if t > 0]
        row = row._replace(targets=own + row.targets)
    return [row]


def attention_mask(segments: Int[Tensor, "row token"]) -> Bool[Tensor, "row 1 query key"]:
    """Mask of the keys that each query may see: earlier real tokens of the row, but never chosen from rejected.

    Padding sees itself alone, so that no softmax runs over nothing (a fully masked row is NaN in some kernels).

    >>> attention_mask(torch.tensor([[1, 2, 3, 0]])).int()[0, 0].tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    visible = causal & (key != PAD) & (query != PAD) & ~((query == REJECTED) & (key == CHOSEN))
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)
    return (visible | itself)[:, None]
