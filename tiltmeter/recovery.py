"""How much of the way from one model to another a steered model has gone, teacher-forced, in KL divergence (control C16).

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

from tiltmeter.bootstrap import Interval, cluster_interval

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
    """What steering with one strength reached, with intervals over prompts."""

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


def kl_divergences(
    logits_p: Float[Tensor, "target vocab"], logits_q: Float[Tensor, "target vocab"]
) -> Float[Tensor, " target"]:
    """KL(p ‖ q) = Σ_j p_j (log p_j − log q_j) in nats at each place, in float32 or better; words that p rules out add 0.

    >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> round(float(kl_divergences(p, q)), 6)  # ½ ln 2 + ½ ln ⅔
    0.143841
    """
    return _kl(_log_softmax(logits_p), _log_softmax(logits_q))


def top1_agreement(
    logits_p: Float[Tensor, "target vocab"], logits_q: Float[Tensor, "target vocab"]
) -> Float[Tensor, " target"]:
    """1 where both rank the same word first, else 0; of equal words the first one counts; NaN where a logit is NaN.

    >>> top1_agreement(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 0.1], [0.0, 0.1]])).tolist()
    [1.0, 0.0]
    """
    (best_p, word_p), (best_q, word_q) = logits_p.max(-1), logits_q.max(-1)
    agree = (word_p == word_q).to(torch.promote_types(logits_p.dtype, torch.float32))
    return agree.masked_fill(best_p.isnan() | best_q.isnan(), torch.nan)


class RecoveryMoments:
    """Accumulates one sweep over strengths in O(strengths × rows) memory, in any order and any cut into chunks.

    Args:
        strengths: λ of each steered model.
        n_rows: responses of the data set.
        direction: which model steering starts from, and which it aims at.

    >>> moments = RecoveryMoments([0.0, 1.0], n_rows=1)
    >>> policy, base = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    >>> moments.update(policy, base, [base, policy], torch.tensor([0]))
    >>> [found.recovery.value for found in moments.summary(["a prompt"])]
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
        log_goal = _log_softmax(goal)
        parts = [torch.ones_like(log_goal[:, 0])]
        for logits in chain([start], steered):
            parts += [_kl(log_goal, _log_softmax(logits)), top1_agreement(goal, logits)]
        n_steered = (len(parts) - 3) // 2
        if n_steered != len(self.strengths):
            raise ValueError(f"RecoveryMoments: expected logits of {len(self.strengths)} strengths, got {n_steered}")
        self._rounding = max(self._rounding, torch.finfo(log_goal.dtype).eps)
        kept = rows >= 0
        table = torch.stack([part.to(log_goal.dtype) for part in parts])[:, kept]
        self._sums.index_add_(1, rows[kept].cpu(), table.cpu().to(torch.float64))

    def row_sums(self) -> RowSums:
        """What every row has gathered: for paired differences between vectors, layers or arms."""
        n_tokens, kl_start, agree_start = self._sums[:3].clone()
        return RowSums(n_tokens, kl_start, agree_start, self._sums[3::2].clone(), self._sums[4::2].clone())

    def start(self, groups: Sequence[str], *, n_resamples: int = 2000, seed: int = 0) -> Recovery:
        """The model that steering starts from, as :meth:`summary` would say of strength 0."""
        sums = self.row_sums()
        return self._recovery(0.0, sums.kl_start, sums.agree_start, groups, n_resamples, seed)

    def summary(self, groups: Sequence[str], *, n_resamples: int = 2000, seed: int = 0) -> list[Recovery]:
        """R, KL and agreement of every strength, with 95 % bootstrap intervals over prompts (of ratios of sums).

        Args:
            groups: a name for each row; rows of one prompt share it.

        Raises:
            ValueError: another number of names than rows, or no token at all.
        """
        sums = self.row_sums()
        return [
            self._recovery(strength, kl, agree, groups, n_resamples, seed)
            for strength, kl, agree in zip(self.strengths, sums.kl_steered, sums.agree_steered, strict=True)
        ]

    def _recovery(
        self, strength: float, kl: Tensor, agree: Tensor, groups: Sequence[str], n_resamples: int, seed: int
    ) -> Recovery:
        n_tokens, kl_start = self._sums[0], self._sums[1]
        if len(groups) != len(n_tokens):
            raise ValueError(f"RecoveryMoments: expected {len(n_tokens)} names of groups, got {len(groups)}")
        read = n_tokens > 0
        names = [name for name, there in zip(groups, read.tolist(), strict=True) if there]

        def ratio(above: Tensor, below: Tensor) -> Interval:
            a, b = above[read], below[read]
            return cluster_interval(lambda drawn: drawn @ a / (drawn @ b), names, n_resamples=n_resamples, seed=seed)

        if float(kl_start.sum()) > self._rounding * float(n_tokens.sum()):
            lost = ratio(kl, kl_start)
            recovery = Interval(1 - lost.value, 1 - lost.high, 1 - lost.low)
        else:
            recovery = Interval(math.nan, math.nan, math.nan)
        return Recovery(
            strength, recovery, ratio(kl, n_tokens), ratio(agree, n_tokens), int(n_tokens.sum()), len(names)
        )


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    terms = (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -math.inf, 0.0)
    return terms.sum(-1)
