"""Win rate between replies of equal length: the preference that is left once length is taken out."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tiltmeter.stats.jackknife import LOG_ODDS, NO_INTERVAL, Interval, jackknife_interval
from tiltmeter.stats.proportions import share_interval

LENGTH_EFFECT_VARIANCE = 10.0
"""Variance of the length effect's normal prior, log-odds². Wide, it only keeps the effect finite where longer always wins."""
_NEWTON_STEPS = 30


def length_controlled(
    verdicts: Sequence[float], clusters: Sequence[str], length_differences: Sequence[float]
) -> Interval:
    """Win rate between replies of equal length: σ(b₀) of P(win) = σ(b₀ + b₁ tanh(Δ / s)).

    Δ is the length difference, s its standard deviation, a tie half a win. The form of AlpacaEval's length control
    (arXiv 2404.04475) without its term for how hard each instruction is, which is known for its own instructions only.
    b₁ has a normal prior of variance :data:`LENGTH_EFFECT_VARIANCE`, b₀ none; everything, s too, is taken anew
    where a prompt is left out for the interval.

    Returns:
        NaN where one side is longer in every pair: equal lengths were then never seen, only guessed at.

    >>> longer_wins = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    >>> round(length_controlled(longer_wins, list("abcdef"), [5.0, 6.0, 7.0, -5.0, -6.0, -7.0]).value, 6)
    0.5
    """
    y = torch.as_tensor(np.asarray(verdicts, dtype=np.float64))
    delta = torch.as_tensor(np.asarray(length_differences, dtype=np.float64))
    estimate = partial(_equal_length_win_rates, y, delta)
    if math.isnan(float(estimate(torch.ones(1, len(y), dtype=torch.float64))[0])):
        return NO_INTERVAL
    if len(set(verdicts)) == 1:  # nothing that length could explain
        return share_interval(verdicts, clusters)
    return jackknife_interval(estimate, clusters, scale=LOG_ODDS)


def _equal_length_win_rates(
    y: Float[Tensor, " row"], delta: Float[Tensor, " row"], weights: Float[Tensor, "resample row"]
) -> Float[Tensor, " resample"]:
    """σ(b₀) of each weighting by Newton's method: two parameters, concave, all resamples at once."""
    total = weights.sum(1, keepdim=True)
    mean = (weights @ delta)[:, None] / total
    spread = ((weights * (delta - mean).square()).sum(1, keepdim=True) / total).sqrt()
    x = torch.where(spread > 0, torch.tanh(delta / spread), 0.0)
    b = torch.zeros(len(weights), 2, dtype=weights.dtype)
    for _ in range(_NEWTON_STEPS):
        p = torch.sigmoid(b[:, :1] + b[:, 1:] * x)
        gap, curve = weights * (y - p), weights * p * (1 - p)
        slope = torch.stack([gap.sum(1), (gap * x).sum(1) - b[:, 1] / LENGTH_EFFECT_VARIANCE], dim=1)
        a, c = curve.sum(1) + 1e-9, (curve * x).sum(1)  # all wins: b₀ grows without end, and p is 1 long before
        d = (curve * x.square()).sum(1) + 1 / LENGTH_EFFECT_VARIANCE
        step = torch.stack([d * slope[:, 0] - c * slope[:, 1], a * slope[:, 1] - c * slope[:, 0]], dim=1)
        step = (step / (a * d - c.square())[:, None]).clamp(-2, 2)
        b = b + step
        if step.abs().max() < 1e-9:
            break
    drawn = weights > 0
    seen = ((delta >= 0) & drawn).any(1) & ((delta <= 0) & drawn).any(1)
    return torch.where(seen, torch.sigmoid(b[:, 0]), math.nan)
