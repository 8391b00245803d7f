"""Confidence intervals of shares, and of means of scores that lie in 0 … 1, that stay there and never have width 0."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta
from scipy.stats import t as student

from tiltmeter.stats.jackknife import Interval, ratio_variance

_PRIOR_VALUES = 2
"""Values as variable as yes and no that are added to the observed variance: a few scores can look more alike than they are."""


def share_interval(values: Sequence[float], clusters: Sequence[str], *, level: float = 0.95) -> Interval:
    """Mean of values in 0 … 1 with the interval of Clopper & Pearson (1934) at an effective sample size (Korn & Graubard 1998).

    Of shares of independent prompts (each value 0 or 1) it is Clopper–Pearson's, which holds its level at every N and share;
    Wilson's does not (N = 8, share .98: 85 %). Otherwise N is replaced by the number of independent yes/no answers that would
    be as variable:

        n_eff = N · [p(1 − p)/s²] / max(1, V N/s₀²) · (t_{N−1} / t_{G−1})²,    s² = (N s₀² + 2 p(1 − p)) / (N + 2)

    with s₀² the variance of the values (a tie counts ½ and varies less than yes or no), V the jackknife variance of their mean
    over G clusters, t Student's quantiles. Values that are all equal have no variance to go by: each cluster is one answer.

    Args:
        values: N figures from 0 to 1: yes or no, half for a tie, a probability.
        clusters: N names; values of equal name (prompt) are not independent.
        level: of confidence.

    Returns:
        0 … 1 with a single cluster.

    Raises:
        ValueError: no values, lengths that differ, or values outside 0 … 1.

    >>> [round(end, 3) for end in share_interval([1.0] * 8, list("abcdefgh"))]  # (α/2)^⅛ … 1
    [1.0, 0.631, 1.0]
    """
    exact = np.asarray(values, dtype=np.float64)
    return _interval(exact, np.ones_like(exact), clusters, float(exact.var()) if len(exact) else 0.0, level)


def pooled_share_interval(
    successes: Sequence[float], totals: Sequence[float], clusters: Sequence[str], *, level: float = 0.95
) -> Interval:
    """Σ successes / Σ totals, such as a share of all tokens, with the interval of :func:`share_interval`.

    Args:
        successes, totals: of each row, for example of each response.
        clusters: a name for each row; rows of equal name (prompt) are not independent.
        level: of confidence.

    Raises:
        ValueError: nothing counted, lengths that differ, or more successes than there can be.

    >>> pooled_share_interval([8.0], [8.0], ["a"])
    Interval(value=1.0, low=0.0, high=1.0)
    """
    exact, counts = np.asarray(successes, dtype=np.float64), np.asarray(totals, dtype=np.float64)
    p = float(exact.sum() / counts.sum()) if counts.sum() > 0 else 0.0
    return _interval(exact, counts, clusters, p * (1 - p), level)


def _interval(
    sums: NDArray[np.float64], counts: NDArray[np.float64], clusters: Sequence[str], spread: float, level: float
) -> Interval:
    if (
        not len(sums) == len(counts) == len(clusters)
        or not counts.sum() > 0
        or not ((sums >= 0) & (sums <= counts)).all()
    ):
        raise ValueError(
            f"expected shares from 0 to 1 of at least one and as many clusters, got {len(sums)} and {len(clusters)}"
        )
    n, n_clusters, p = float(counts.sum()), len(set(clusters)), float(sums.sum() / counts.sum())
    if n_clusters < 2:
        return Interval(p, 0.0, 1.0)
    n_effective = float(n_clusters)
    if spread > 0:
        design_effect = max(1.0, ratio_variance(sums, counts, clusters) * (n - 1) / spread)
        steadied = (n * spread + _PRIOR_VALUES * p * (1 - p)) / (n + _PRIOR_VALUES)
        tails = student.ppf((1 + level) / 2, [n - 1, n_clusters - 1])
        n_effective = float(n * p * (1 - p) / steadied / design_effect * (tails[0] / tails[1]) ** 2)
    successes, failures, tail = p * n_effective, (1 - p) * n_effective, (1 - level) / 2
    low = float(beta.ppf(tail, successes, failures + 1)) if successes > 0 else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, failures)) if failures > 0 else 1.0
    return Interval(p, low, high)
