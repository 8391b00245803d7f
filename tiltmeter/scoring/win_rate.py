"""Win rates from verdicts, whoever gave them: ties are half, intervals are over prompts, length is taken out."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tiltmeter.scoring.scorer import MAX_MISSING_SHARE, Figure
from tiltmeter.stats.jackknife import LOG_ODDS, Interval, cluster_mean_interval, jackknife_interval
from tiltmeter.stats.proportions import share_interval

LENGTH_EFFECT_VARIANCE = 10.0
"""Of the normal prior of the length effect, in squared log-odds. Wide, it only keeps the effect finite where longer always wins."""
_NEWTON_STEPS = 30
_NOTHING = Interval(math.nan, math.nan, math.nan)
_OUTCOMES = {"wins": 1.0, "ties": 0.5, "losses": 0.0}


def win_rate_figures(
    name: str,
    verdicts: Sequence[float],
    clusters: Sequence[str],
    length_differences: Sequence[int] | Sequence[float],
    *,
    scorer: str,
    max_missing: float = MAX_MISSING_SHARE,
) -> list[Figure]:
    """All figures of one comparison, with 95 % intervals over prompts.

    ============================ ====================================================================
    ``<name>``                   (wins + ties / 2) / verdicts
    ``<name>_wins``              share of wins; ``_ties`` and ``_losses`` likewise
    ``<name>_length_controlled`` the win rate between replies of equal length (:func:`length_controlled`)
    ``<name>_length_difference`` mean length of the candidate less that of its opponent, over all pairs
    ============================ ====================================================================

    Args:
        verdicts: 1 the candidate is better, 0.5 tie, 0 worse, NaN missing.
        clusters: prompt of each; verdicts on one prompt are not independent.
        length_differences: candidate less opponent, in any unit.
        max_missing: share of missing verdicts above which figures of verdicts are NaN.

    Raises:
        ValueError: lengths that differ, or a verdict that isn't 1, 0.5, 0 or NaN.

    >>> win_rate_figures("win_rate", [1.0, 1.0, 0.5, 0.0], list("abcd"), [3.0, -2.0, 0.0, 1.0], scorer="coin")[0].value
    0.625
    """
    if not len(verdicts) == len(clusters) == len(length_differences):
        raise ValueError(
            f"expected one cluster and one length difference a verdict, got {len(verdicts)}, {len(clusters)}, "
            f"{len(length_differences)}"
        )
    y = np.asarray(verdicts, dtype=np.float64)
    valid = ~np.isnan(y)
    if not np.isin(y[valid], list(_OUTCOMES.values())).all():
        raise ValueError(f"expected verdicts 1, 0.5, 0 or NaN, got {sorted(set(y[valid].tolist()))}")
    n, n_missing = int(valid.sum()), int((~valid).sum())
    kept = [cluster for cluster, is_valid in zip(clusters, valid, strict=True) if is_valid]
    differences = np.asarray(length_differences, dtype=np.float64)
    enough = n > 0 and n_missing <= max_missing * len(y)
    shares = {"": y[valid]} | {f"_{what}": (y[valid] == worth) * 1.0 for what, worth in _OUTCOMES.items()}
    found = {end: share_interval(values.tolist(), kept) if enough else _NOTHING for end, values in shares.items()}
    found["_length_controlled"] = (
        length_controlled(y[valid].tolist(), kept, differences[valid].tolist()) if enough else _NOTHING
    )
    figures = [Figure(name + end, "both", *interval, n, n_missing, scorer) for end, interval in found.items()]
    longer = cluster_mean_interval(differences.tolist(), clusters) if len(y) else _NOTHING
    return [*figures, Figure(f"{name}_length_difference", "both", *longer, len(y), 0, scorer)]


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
        return _NOTHING
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
