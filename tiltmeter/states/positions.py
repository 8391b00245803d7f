"""Rows of a batch that hold the hidden states of interest: positions, as a pure function of a PreferenceBatch.

With prompt ``x₁ … x_P``, responses ``y^w`` and ``y^l`` and h(t) the hidden state *at* token t (it predicts token t+1):

================== ============================================================ ==========================================
position           reading                                                      side
================== ============================================================ ==========================================
``prompt_last``    h(x_P), which predicts the first token of both responses     prompt, one a pair
``content``        h(x_t), t drawn by a seed among the prompt's own tokens:     prompt, one a pair; none for a prompt
                   those that not nearly all prompts hold                       that holds shared tokens alone
``diverge``        h(token before the first place k where y^w_k ≠ y^l_k): it    prompt, one a pair; none for a pair whose
                   predicts y^w_k and y^l_k and has seen neither                responses never differ (one begins the other)
``response_last``  h(last token of the response)                                chosen and rejected
``response_mean``  mean of h over the response's own tokens                     chosen and rejected
``response_all``   h(t) of every token of the response                          chosen and rejected
================== ============================================================ ==========================================

Both layouts give the same readings: at ``diverge`` the context is shared, and the chosen row is read. Padding is never read,
on either side, and neither are pairs of weight 0.

At ``prompt_last`` the prompts of a template end in the same tokens, and states of equal tokens resemble one another in any
model; ``content`` (:func:`content_tokens`) is what to hold such a figure against.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, product
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltmeter.errors import UserError
from tiltmeter.pairs.batch import CHOSEN, PROMPT, REJECTED, PreferenceBatch

Position = Literal["prompt_last", "content", "response_last", "response_mean", "diverge", "response_all"]
POSITIONS: tuple[Position, ...] = get_args(Position)

SIDE_NAMES = {PROMPT: "prompt", CHOSEN: "chosen", REJECTED: "rejected"}
"""Names of ``Readings.sides``: whose tokens were read; ``prompt``: what both responses have in common."""
SHARED_BY = 0.95
"""Share of the prompts that hold a token id from which on it is no content: of a template, of role markers, BOS."""


@dataclass(frozen=True, eq=False)
class Readings:
    """Flattened rows of a batch to read, and what each *reading* (a row, or a mean of rows) belongs to.

    Readings are ordered by pair, chosen before rejected, then by token: the same order in every layout.
    """

    rows: Int[Tensor, " row"]
    """Indices into the flattened [row token] of the batch."""
    reading_of_row: Int[Tensor, " row"] | None
    """Reading that each row is averaged into; None: every row is a reading of its own."""
    pairs: Int[Tensor, " reading"]
    """Place of the pair in the batch."""
    pair_index: Int[Tensor, " reading"]
    """``PreferenceBatch.pair_index`` of that pair: its row in the data set."""
    sides: Int[Tensor, " reading"]
    """PROMPT, CHOSEN or REJECTED of :mod:`tiltmeter.pairs.batch`."""
    grid: tuple[int, int]
    """Rows and tokens of the batch that the indices belong to."""

    def __len__(self) -> int:
        return len(self.pairs)

    def to(self, device: torch.device | str) -> "Readings":
        """Move every tensor of the readings to another device."""
        owned = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in owned.items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def gather(
        self, hidden: Float[Tensor, "row token d_model"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "reading d_model"]:
        """The readings as new memory, never a view; means are taken in float64 whatever the dtype.

        Args:
            hidden: hidden states of the whole batch.
            dtype: of the result; None: that of ``hidden``.

        Raises:
            ValueError: hidden states of another batch.
        """
        if tuple(hidden.shape[:2]) != self.grid:
            raise ValueError(
                f"readings of a batch of {self.grid[0]} × {self.grid[1]} tokens, got hidden states of "
                f"{hidden.shape[0]} × {hidden.shape[1]}; one forward pass on that batch, without cache, was expected"
            )
        picked = hidden.flatten(0, 1).index_select(0, self.rows.to(hidden.device))
        dtype = hidden.dtype if dtype is None else dtype
        if self.reading_of_row is None:
            return picked.to(dtype)
        exact = torch.float32 if hidden.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        groups = self.reading_of_row.to(hidden.device)
        sums = picked.new_zeros(len(self), picked.shape[1], dtype=exact).index_add(0, groups, picked.to(exact))
        counts = torch.bincount(groups, minlength=len(self))
        return (sums / counts[:, None]).to(dtype)


class Divergence(NamedTuple):
    """Places where the responses of each pair part; only pairs whose responses do."""

    pairs: Int[Tensor, " diverging"]
    """Place of the pair in the batch."""
    rows: Int[Tensor, " diverging"]
    """Flattened row whose hidden state predicts the tokens below."""
    chosen_ids: Int[Tensor, " diverging"]
    """w: first token of the chosen response that differs."""
    rejected_ids: Int[Tensor, " diverging"]
    """l: the rejected response's token at the same place."""


def check_position(position: str) -> Position:
    """A position by its name.

    Raises:
        UserError: unknown.
    """
    if position not in POSITIONS:
        raise UserError(f"positions: expected one of {', '.join(POSITIONS)}, got {position!r}")
    return position


def content_tokens(prompts: Sequence[Sequence[int]], *, seed: int = 0) -> list[int | None]:
    """The place of one content token in each prompt, drawn at random; None for a prompt that has none.

    Content is a token whose id fewer than :data:`SHARED_BY` of all prompts hold: not BOS, role markers and the words of a
    template, and not the prompt's last token. Only one prompt that was cut from the left may miss a marker, hence not "all".
    The draw depends on the seed and on the prompt's own tokens alone: it is the same for both models, in every process, batch
    and order, and for every pair of one prompt. Which tokens are shared depends on the set of prompts, so give all of them.

    Args:
        prompts: token ids of the prompt of every pair.
        seed: of the draw.

    >>> content_tokens([[1, 7, 5, 9], [1, 8, 9], [1, 9]])
    [1, 1, None]
    """
    held = Counter(token for prompt in set(map(tuple, prompts)) for token in set(prompt))
    n_needed = math.ceil(SHARED_BY * len(set(map(tuple, prompts))))
    places: list[int | None] = []
    for prompt in prompts:
        own = [at for at, token in enumerate(prompt[:-1]) if held[token] < n_needed]
        key = hashlib.sha256(f"{seed} {list(map(int, prompt))}".encode()).digest()
        places.append(own[int.from_bytes(key[:8], "big") % len(own)] if own else None)
    return places


def divergence(batch: PreferenceBatch) -> Divergence:
    """The first place where chosen and rejected differ, for every real pair that has one.

    A pair is left out when one response begins the other: there is no token of both sides to compare.

    Raises:
        UserError: the batch has no rejected responses.
    """
    _need_rejected(batch, "diverge")
    n = batch.n_pairs
    ids, rows = _by_sequence(batch, batch.target_ids), _by_sequence(batch, batch.target_rows)
    found: list[tuple[int, int, int, int]] = []
    for pair in _real_pairs(batch):
        for row, chosen, rejected in zip(
            rows[pair], ids[pair], ids[n + pair], strict=False
        ):  # the shorter response ends the search
            if chosen != rejected:
                found.append((pair, row, chosen, rejected))
                break
    table = torch.tensor(found, dtype=torch.long, device=batch.input_ids.device).reshape(-1, 4)
    return Divergence(*table.unbind(1))


def readings(batch: PreferenceBatch, position: Position, *, content: Sequence[int | None] | None = None) -> Readings:
    """The rows to read at a position, for every real pair of a batch.

    Args:
        content: for ``content``: the place in the prompt of each row of the data set (:func:`content_tokens`).

    Raises:
        UserError: ``diverge`` on a batch without rejected responses, or ``content`` without its places.

    >>> from tiltmeter.pairs.batch import TokenizedPair, collate_pairs
    >>> batch = collate_pairs([TokenizedPair([1, 5], [6, 2], [6, 8, 2])], pair_index=[40])
    >>> readings(batch, "diverge").rows.tolist(), readings(batch, "response_last").rows.tolist()
    ([2], [3, 6])
    >>> mean = readings(batch, "response_mean")
    >>> mean.rows.tolist(), mean.reading_of_row.tolist(), mean.pair_index.tolist(), mean.sides.tolist()
    ([2, 3, 4, 5, 6], [0, 0, 1, 1, 1], [40, 40], [2, 3])
    """
    if position == "diverge":
        found = divergence(batch)
        return _make(batch, found.rows.tolist(), list(product(found.pairs.tolist(), [PROMPT])))
    held = _rows_by_pair_and_side(batch)
    if position == "content":
        places = _content_places(batch, content)
        return _make(batch, [held[owner][at] for owner, at in places.items()], list(places))
    sides = (PROMPT,) if position == "prompt_last" else (CHOSEN, REJECTED)
    owners = [owner for owner in product(_real_pairs(batch), sides) if owner in held]
    if position in ("prompt_last", "response_last"):
        return _make(batch, [held[owner][-1] for owner in owners], owners)
    rows = [row for owner in owners for row in held[owner]]
    owner_of_row = [i for i, owner in enumerate(owners) for _ in held[owner]]
    if position == "response_all":
        return _make(batch, rows, [owners[i] for i in owner_of_row])
    return _make(batch, rows, owners, owner_of_row)


def _content_places(batch: PreferenceBatch, content: Sequence[int | None] | None) -> dict[tuple[int, int], int]:
    """Place of the content token in the prompt of each real pair that has one."""
    if content is None:
        raise UserError("positions: content needs the place of each prompt's content token (content_tokens)")
    index = batch.pair_index.tolist()
    places = {(pair, PROMPT): content[index[pair]] for pair in _real_pairs(batch)}
    return {owner: at for owner, at in places.items() if at is not None}


def _make(
    batch: PreferenceBatch,
    rows: Sequence[int],
    owners: Sequence[tuple[int, int]],
    reading_of_row: Sequence[int] | None = None,
) -> Readings:
    device = batch.input_ids.device

    def integers(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    pairs = integers([pair for pair, _ in owners])
    return Readings(
        rows=integers(rows),
        reading_of_row=None if reading_of_row is None else integers(reading_of_row),
        pairs=pairs,
        pair_index=batch.pair_index[pairs],
        sides=integers([side for _, side in owners]),
        grid=(batch.input_ids.shape[0], batch.input_ids.shape[1]),
    )


def _real_pairs(batch: PreferenceBatch) -> list[int]:
    return [pair for pair, weight in enumerate(batch.weights.tolist()) if weight != 0]


def _by_sequence(batch: PreferenceBatch, values: Int[Tensor, " target"]) -> list[list[int]]:
    """A value of each target, gathered by the sequence that it belongs to."""
    lists: list[list[int]] = [[] for _ in range(batch.n_sequences)]
    for sequence, value in zip(batch.target_sequences.tolist(), values.tolist(), strict=True):
        lists[sequence].append(value)
    return lists


def _rows_by_pair_and_side(batch: PreferenceBatch) -> dict[tuple[int, int], list[int]]:
    """Flattened indices of the tokens of each pair's prompt, chosen and rejected response; the prompt's in the chosen row."""
    held: dict[tuple[int, int], list[int]] = {}
    for row, (start, segments) in enumerate(_rows(batch)):
        pair, first_of_pair = row % batch.n_pairs, row < batch.n_pairs
        for at, segment in enumerate(segments, start):
            if segment in (CHOSEN, REJECTED) or (segment == PROMPT and first_of_pair):
                held.setdefault((pair, segment), []).append(at)
    return held


def _rows(batch: PreferenceBatch) -> Iterator[tuple[int, list[int]]]:
    """Flattened start and segments of every row, or of every document of a packed one, which are in the same order."""
    segments = batch.segments.flatten().tolist()
    width = batch.segments.shape[1]
    sizes = [width] * len(batch.segments) if batch.packing is None else batch.packing.sizes
    for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
        yield start, segments[start : start + size]


def _need_rejected(batch: PreferenceBatch, position: str) -> None:
    if batch.layout == "chosen_only":
        raise UserError(
            f"positions: {position} needs chosen and rejected responses; layout chosen_only has no rejected ones"
        )
