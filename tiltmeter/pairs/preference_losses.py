"""The preference losses: one pure function per loss, from log-probabilities of pairs to one loss per pair, and a registry.

Every function takes the summed log-probs of a batch of pairs and its own options as keywords; an option that a loss does not
have is an error, never ignored. All expectations over pairs are left to the caller.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tiltmeter.errors import UserError

PAIR_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""Metrics logged of every pair, behind ``train/`` and ``val/`` (TRL's names); rewards are β·log(π/π₀) whatever the loss."""


class PairLogProbs(NamedTuple):
    """Summed log-probabilities in nats of B pairs under policy and reference, and the responses' token counts."""

    chosen: Float[Tensor, " pair"]
    rejected: Float[Tensor, " pair"]
    reference_chosen: Float[Tensor, " pair"] | None = None
    reference_rejected: Float[Tensor, " pair"] | None = None
    chosen_tokens: Int[Tensor, " pair"] | None = None
    rejected_tokens: Int[Tensor, " pair"] | None = None

    def log_ratios(self) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """log π/π₀ of chosen and rejected, in nats.

        Raises:
            ValueError: no reference log-probs were given.
        """
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("this loss needs reference log-probs (reference_chosen, reference_rejected); got none")
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    def margins(self) -> Float[Tensor, " pair"]:
        """m = log π/π₀ (chosen) − log π/π₀ (rejected), in nats."""
        chosen, rejected = self.log_ratios()
        return chosen - rejected

    def token_counts(self) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """Number of response tokens, at least 1, as floats.

        Raises:
            ValueError: no counts were given.
        """
        if self.chosen_tokens is None or self.rejected_tokens is None:
            raise ValueError("this loss needs token counts (chosen_tokens, rejected_tokens); got none")
        dtype = self.chosen.dtype
        return self.chosen_tokens.clamp(min=1).to(dtype), self.rejected_tokens.clamp(min=1).to(dtype)


def sigmoid_loss(pairs: PairLogProbs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Float[Tensor, " pair"]:
    """DPO (arXiv 2305.18290, eq. 7): −log σ(β m); with ε = label_smoothing cDPO: −(1−ε) log σ(β m) − ε log σ(−β m).

    >>> zero = torch.zeros(1)
    >>> round(sigmoid_loss(PairLogProbs(zero, zero, zero, zero)).item(), 6)  # policy = reference: ln 2
    0.693147
    """
    _check_range("label_smoothing", label_smoothing, 0.0, 0.5, closed=True)
    logits = beta * pairs.margins()
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def robust_loss(pairs: PairLogProbs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Float[Tensor, " pair"]:
    """Robust DPO (arXiv 2403.00409): [−(1−ε) log σ(β m) + ε log σ(−β m)] / (1 − 2ε), unbiased when labels flip with ε."""
    _check_range("label_smoothing", label_smoothing, 0.0, 0.5, closed=False)
    logits = beta * pairs.margins()
    unscaled = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return unscaled / (1 - 2 * label_smoothing)


def hinge_loss(pairs: PairLogProbs, *, beta: float = 0.1) -> Float[Tensor, " pair"]:
    """Hinge on the normalised likelihood (SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657): max(0, 1 − β m)."""
    return torch.relu(1 - beta * pairs.margins())


def ipo_loss(pairs: PairLogProbs, *, beta: float = 0.1) -> Float[Tensor, " pair"]:
    """IPO (arXiv 2310.12036, eq. 17) on MEAN token log-ratios: (h − 1/(2β))², h = log-ratio per token, chosen − rejected.

    Means rather than sums, as the IPO authors recommend for the published code and TRL implements.
    """
    chosen, rejected = pairs.log_ratios()
    chosen_tokens, rejected_tokens = pairs.token_counts()
    return (chosen / chosen_tokens - rejected / rejected_tokens - 1 / (2 * beta)) ** 2


def simpo_loss(pairs: PairLogProbs, *, beta: float = 10.0, gamma_beta_ratio: float = 0.5) -> Float[Tensor, " pair"]:
    """SimPO (arXiv 2405.14734, eq. 6), no reference: −log σ(β (ℓ̄_w − ℓ̄_l) − γ), ℓ̄ = mean token log-prob, γ = β · ratio."""
    _check_range("gamma_beta_ratio", gamma_beta_ratio, 0.0, math.inf, closed=False)
    chosen_tokens, rejected_tokens = pairs.token_counts()
    difference = pairs.chosen / chosen_tokens - pairs.rejected / rejected_tokens
    return -F.logsigmoid(beta * (difference - gamma_beta_ratio))


def chosen_nll(pairs: PairLogProbs) -> Float[Tensor, " pair"]:
    """Negative log-likelihood of the chosen response, nats per token: −log π(y_w|x) / |y_w|.

    The supervised term of RPO (arXiv 2404.19733, eq. 1): each pair counts the same, whatever its length. TRL's ``sft`` loss
    averages over all tokens of a micro-batch instead.
    """
    return -pairs.chosen / pairs.token_counts()[0]


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss with its options bound: call it with :class:`PairLogProbs`, get one loss per pair."""

    name: str
    function: Callable[[PairLogProbs], Float[Tensor, " pair"]]
    beta: float
    sft_weight: float = 0.0

    def __call__(self, pairs: PairLogProbs) -> Float[Tensor, " pair"]:
        """Loss of each pair, with ``sft_weight`` times :func:`chosen_nll`."""
        loss = self.function(pairs)
        return loss + self.sft_weight * chosen_nll(pairs) if self.sft_weight else loss


PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "simpo": simpo_loss,
}


def make_preference_loss(name: str, sft_weight: float = 0.0, **options: float | int | str | None) -> PreferenceLoss:
    """Look a loss up and bind its options; an option left None takes the loss's own default.

    Args:
        name: a key of :data:`PREFERENCE_LOSSES`.
        sft_weight: of the supervised term :func:`chosen_nll`, which any loss can have.
        options: of the loss.

    Raises:
        UserError: unknown loss, an option that this loss does not have, or a value out of range.

    >>> make_preference_loss("hinge", label_smoothing=0.1)
    Traceback (most recent call last):
    tiltmeter.errors.UserError: module.loss=hinge has no option label_smoothing (it has: beta); leave it out or choose another loss
    """
    if name not in PREFERENCE_LOSSES:
        raise UserError(f"module.loss: expected one of {', '.join(PREFERENCE_LOSSES)}, got {name}")
    function = PREFERENCE_LOSSES[name]
    defaults = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    given = {key: _number(key, value) for key, value in options.items() if value is not None}
    for key in given:
        if key not in defaults:
            has = ", ".join(defaults)
            raise UserError(
                f"module.loss={name} has no option {key} (it has: {has}); leave it out or choose another loss"
            )
    beta = float(given.get("beta", defaults["beta"]))
    if not 0 < beta < math.inf:
        raise UserError(f"module.beta: expected a finite number above 0, got {beta}")
    bound = partial(function, **given)
    example = torch.zeros(1)
    count = torch.ones(1, dtype=torch.long)
    bound(PairLogProbs(example, example, example, example, count, count))  # range errors now, not after loading a model
    return PreferenceLoss(name, bound, beta, sft_weight)


def _number(name: str, value: float | int | str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UserError(f"module.{name}: expected a number, got {value}") from error


def _check_range(name: str, value: float, low: float, high: float, *, closed: bool) -> None:
    if not (low <= value <= high if closed else low <= value < high):
        sign = "≤" if closed else "<"
        raise UserError(f"module.{name}: expected {low:g} ≤ {name} {sign} {high:g}, got {value:g}")
