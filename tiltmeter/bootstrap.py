"""Confidence intervals by resampling prompts: pairs of one prompt are not independent."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float


def cluster_mean_interval(
    values: Sequence[float], clusters: Sequence[str], *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of values with a percentile bootstrap interval over whole clusters (prompts).

    A resample draws as many clusters as there are, with replacement, and takes Σ values / Σ counts over them.

    Args:
        values: N figures, one a pair.
        clusters: N names; values of equal name are drawn together.

    Raises:
        ValueError: no values, or lengths that differ.

    >>> cluster_mean_interval([1.0, 1.0, 1.0], ["a", "a", "b"])
    Interval(value=1.0, low=1.0, high=1.0)
    """
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"expected values and clusters of one length above 0, got {len(values)} and {len(clusters)}")
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(index).astype(np.float64)
    mean = float(sums.sum() / counts.sum())
    if len(names) < 2:
        return (
            Interval(mean, mean, mean)
            if np.ptp(np.asarray(values)) == 0
            else Interval(mean, float("-inf"), float("inf"))
        )
    result = bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=n_resamples,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return Interval(mean, float(interval.low), float(interval.high))
