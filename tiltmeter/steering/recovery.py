"""Share of the way from one model to another that a steered model has gone, teacher-forced, in KL divergence (control C16).

    R = 1 − KL(π ‖ π_steer) / KL(π ‖ π₀)          interpolation: from the base π₀, steered towards the policy π
    R = 1 − KL(π₀ ‖ π_steer) / KL(π₀ ‖ π)         inversion: from the policy π, steered back to the base π₀

R is 0 for the model that steering starts from, 1 for the one that it aims at, below 0 when steering leads away. Every place
where a response token is predicted counts once; KL is over the whole vocabulary, with no sampling.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltmeter.stats.jackknife import NO_INTERVAL, Interval, jackknife_intervals
from tiltmeter.stats.proportions import pooled_share_interval

Direction = Literal["interpolation", "inversion"]


class RowSums(NamedTuple):
    """Sums over the tokens of each row (a response), in float64 on the CPU; divide by ``n_tokens`` for means a token."""

    n_tokens: Float[Tensor, " row"]
    kl_start: Float[Tensor, " row"]
    """KL(goal ‖ start), nats."""
    agree_start: Float[Tensor, " row"]
    """Tokens at which goal and start rank the same word first."""
    kl_steered: Float[Tensor, "strength row"]
    agree_steered: Float[Tensor, "strength row"]


class Recovery(NamedTuple):
    """Recovery by steering with one strength, with intervals over prompts."""

    strength: float
    recovery: Interval
    """R; NaN where goal and start do not differ by more than rounding."""
    kl: Interval
    """KL(goal ‖ steered), nats a token."""
    agreement: Interval
    """Share of tokens at which goal and steered rank the same word first."""
    n_tokens: int
    n_rows: int
    """Rows with at least one token."""


class RecoverySummary(NamedTuple):
    """One sweep over strengths."""

    start: Recovery
    """The model that steering starts from, as if of strength 0: R is 0."""
    steered: list[Recovery]
    """In the order of the strengths."""


def kl_divergences(
    logits_p: Float[Tensor, "target vocab"], logits_q: Float[Tensor, "target vocab"]
) -> Float[Tensor, " target"]:
    """KL(p ‖ q) = Σ_j p_j (log p_j − log q_j) in nats at each place, in float32 or better; words that p rules out add 0.

    In float32 a place is known to about 1e-6 nats; means over many places to much less.

    >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> round(float(kl_divergences(p, q)), 6)  # ½ ln 2 + ½ ln ⅔
    0.143841
    """
    return _Goal.of(logits_p).kl(logits_q)


def restricted_updates(
    updates: Float[Tensor, "row d_model"],
    v: Float[Tensor, " d_model"],
    directions: Float[Tensor, "k d_model"],
    ranks: Sequence[int],
) -> dict[str, Float[Tensor, "row d_model"]]:
    """Updates to add to each row's base state at λ = 1 for the ladder of control C16, in float64.

    ``mean``: v*, the same for all; ``rank_k``: the row's own update within the first k directions; ``own``: its whole update,
    the oracle, which at the final site recovers everything. Far less recovered by ``mean`` or ``rank_1`` than by ``own`` refutes
    "one vector".

    Args:
        updates: δ_i of the rows that are steered.
        v: v*, of other prompts than those.
        directions: orthonormal, of those other prompts' ΔH (:func:`tiltmeter.geometry.directions.update_directions`).
        ranks: each at most k.

    Raises:
        ValueError: a rank that there are no directions for.

    >>> updates, x = torch.tensor([[2.0, 5.0]]), torch.tensor([[1.0, 0.0]])
    >>> {name: rows.tolist() for name, rows in restricted_updates(updates, x[0], x, [1]).items()}
    {'mean': [[1.0, 0.0]], 'rank_1': [[2.0, 0.0]], 'own': [[2.0, 5.0]]}
    """
    if not all(1 <= rank <= len(directions) for rank in ranks):
        raise ValueError(f"restricted_updates: expected ranks from 1 to {len(directions)}, got {list(ranks)}")
    own, basis = updates.to(torch.float64), directions.to(torch.float64)
    ladder = {f"rank_{rank}": own @ basis[:rank].T @ basis[:rank] for rank in ranks}
    return {"mean": v.to(torch.float64).expand_as(own)} | ladder | {"own": own}


class _Goal(NamedTuple):
    """The common part of comparisons with one distribution."""

    log_probs: Tensor
    probs: Tensor
    words: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "_Goal":
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return cls(log_probs, log_probs.exp(), logits.argmax(-1))

    def kl(self, logits: Tensor) -> Tensor:
        others = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        terms = self.probs * (self.log_probs - others)
        found = terms.sum(-1)
        if found.isnan().any():  # 0 · (−∞ − x) of words that are ruled out
            found = terms.masked_fill(self.probs == 0, 0.0).sum(-1)
        return found

    def agreement(self, logits: Tensor) -> Tensor:
        best, words = logits.max(-1)
        unknown = best.isnan() | self.probs[:, 0].isnan()  # a softmax with one NaN has nothing else
        return (words == self.words).to(self.probs.dtype).masked_fill(unknown, torch.nan)


class RecoveryMoments:
    """Accumulates one sweep over strengths in O(strengths × rows) memory, in any order and any cut into chunks.

    Args:
        strengths: λ of each steered model.
        n_rows: responses of the data set.
        direction: which model steering starts from, and which it aims at.

    >>> moments = RecoveryMoments([0.0, 1.0], n_rows=1)
    >>> policy, base = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    >>> moments.update(policy, base, [base, policy], torch.tensor([0]))
    >>> [found.recovery.value for found in moments.summary(["a prompt"]).steered]
    [0.0, 1.0]
    """

    def __init__(self, strengths: Sequence[float], *, n_rows: int, direction: Direction = "interpolation") -> None:
        if not len(strengths) or n_rows < 1:
            raise ValueError(f"RecoveryMoments: expected strengths and rows, got {len(strengths)} and {n_rows}")
        self.strengths = list(strengths)
        self.direction = direction
        self._sums = torch.zeros(1 + 2 * (1 + len(strengths)), n_rows, dtype=torch.float64)
        """Tokens; then KL and agreement of the start and of each strength."""
        self._rounding = 0.0

    @torch.no_grad()
    def update(
        self,
        policy: Float[Tensor, "target vocab"],
        base: Float[Tensor, "target vocab"],
        steered: Iterable[Float[Tensor, "target vocab"]],
        rows: Int[Tensor, " target"],
    ) -> None:
        """Add a chunk of places that predict response tokens.

        Args:
            policy, base: logits of the two models, without steering.
            steered: logits for each strength, in order: [strength, target, vocab] or a generator, of which one is held
                at a time.
            rows: row that each place belongs to; below 0: left out (padding, prompts, fillers).

        Raises:
            ValueError: shapes that differ, or another number of steered models than strengths.
        """
        goal, start = (policy, base) if self.direction == "interpolation" else (base, policy)
        fixed = _Goal.of(goal)
        parts = [torch.ones_like(fixed.probs[:, 0])]
        for logits in chain([start], steered):
            if logits.shape != goal.shape:  # would broadcast
                raise ValueError(
                    f"RecoveryMoments: expected logits of shape {tuple(goal.shape)}, got {tuple(logits.shape)}"
                )
            parts += [fixed.kl(logits).to(fixed.probs.dtype), fixed.agreement(logits)]
        n_steered = (len(parts) - 3) // 2
        if n_steered != len(self.strengths):
            raise ValueError(f"RecoveryMoments: expected logits of {len(self.strengths)} strengths, got {n_steered}")
        self._rounding = max(self._rounding, torch.finfo(fixed.probs.dtype).eps)
        kept = rows >= 0
        self._sums.index_add_(1, rows[kept].cpu(), torch.stack(parts)[:, kept].cpu().to(torch.float64))

    def row_sums(self) -> RowSums:
        """Sums of every row: for paired differences between vectors, layers or arms."""
        n_tokens, kl_start, agree_start = self._sums[:3].clone()
        return RowSums(n_tokens, kl_start, agree_start, self._sums[3::2].clone(), self._sums[4::2].clone())

    def summary(self, groups: Sequence[str]) -> RecoverySummary:
        """R, KL and agreement of the start and of every strength, with 95 % intervals over prompts.

        Each is a ratio of sums, so every token weighs the same.

        Args:
            groups: a name for each row; rows of one prompt share it.

        Raises:
            ValueError: another number of names than rows, or no token at all.
        """
        n_tokens = self._sums[0]
        if len(groups) != len(n_tokens):
            raise ValueError(f"RecoveryMoments: expected {len(n_tokens)} names of groups, got {len(groups)}")
        read = n_tokens > 0
        names = [name for name, there in zip(groups, read.tolist(), strict=True) if there]
        sums = self._sums[:, read].T
        is_defined = float(sums[:, 1].sum()) > self._rounding * float(sums[:, 0].sum())

        def figures(drawn: Tensor) -> Tensor:
            """R and KL, each of the start and then of every strength."""
            tokens, kl = (drawn @ torch.cat([sums[:, :1], sums[:, 1::2]], dim=1)).tensor_split([1], dim=1)
            recovery = 1 - kl / (kl[:, :1] if is_defined else math.nan)
            return torch.cat([recovery, kl / tokens], dim=1)

        found = jackknife_intervals(figures, names)
        tokens = sums[:, 0].tolist()
        found += [_agreement(column, tokens, names) for column in sums[:, 2::2].T.tolist()]
        step = 1 + len(self.strengths)
        start, *steered = (
            Recovery(strength, found[i], found[step + i], found[2 * step + i], int(n_tokens.sum()), len(names))
            for i, strength in enumerate([0.0, *self.strengths])
        )
        return RecoverySummary(start, steered)


def _agreement(agree: list[float], tokens: list[float], names: Sequence[str]) -> Interval:
    """Share of tokens; NaN where a logit was."""
    if any(map(math.isnan, agree)):
        return NO_INTERVAL
    return pooled_share_interval(agree, tokens, names)
