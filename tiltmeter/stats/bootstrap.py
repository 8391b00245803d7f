"""Confidence intervals by resampling prompts: pairs of one prompt are not independent."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import bootstrap
from torch import Tensor

_WEIGHTS_AT_A_TIME = 4_000_000


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


def paired_difference_interval(
    values: Sequence[float],
    other: Sequence[float],
    clusters: Sequence[str],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of ``values − other``, two figures of the same pair, with an interval over whole clusters.

    Narrower than two separate intervals, since what a pair adds to both sides cancels.

    Raises:
        ValueError: as :func:`cluster_mean_interval`.

    >>> paired_difference_interval([3.0, 13.0], [1.0, 11.0], ["a", "b"])
    Interval(value=2.0, low=2.0, high=2.0)
    """
    if len(values) != len(other):
        raise ValueError(f"expected the same number of values on both sides, got {len(values)} and {len(other)}")
    differences = [a - b for a, b in zip(values, other, strict=True)]
    return cluster_mean_interval(differences, clusters, level=level, n_resamples=n_resamples, seed=seed)


def cluster_interval(
    statistic: Callable[[Float[Tensor, "resample row"]], Float[Tensor, " resample"]],
    clusters: Sequence[str],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Any figure of N rows with a percentile bootstrap interval over whole clusters (prompts).

    Args:
        statistic: from how often each row was drawn (float64, on the CPU), for several resamples at once, to the figure of each.
            Given ones it is the estimate. Example, the norm of the mean row: ``lambda w: (w @ x / w.sum(1, True)).norm(dim=1)``.
        clusters: N names; rows of equal name are drawn together.

    Returns:
        The interval; infinite when there is a single cluster. Resamples in which the figure is NaN are left out.

    Raises:
        ValueError: no rows.

    >>> x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    >>> cluster_interval(lambda w: w @ x / w.sum(1), ["a", "b", "c"]).value
    2.0
    """

    def as_column(drawn: Tensor) -> Tensor:
        return statistic(drawn)[:, None]

    return cluster_intervals(as_column, clusters, level=level, n_resamples=n_resamples, seed=seed)[0]


def cluster_intervals(
    statistic: Callable[[Float[Tensor, "resample row"]], Float[Tensor, "resample figure"]],
    clusters: Sequence[str],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> list[Interval]:
    """:func:`cluster_interval` of several figures of the same rows at once: the same resamples, drawn once for all.

    Args:
        statistic: as there, with a column a figure.
        clusters: N names; rows of equal name are drawn together.

    Raises:
        ValueError: no rows.
    """
    drawn = prompt_resamples(statistic, clusters, n_resamples=n_resamples, seed=seed)
    return [percentile_interval(figure, level=level) for figure in drawn.T]


def percentile_interval(figure: Float[Tensor, " resample"], *, level: float = 0.95) -> Interval:
    """A figure's value with its percentile interval, from :func:`prompt_resamples`; infinite where there are no resamples."""
    value = float(figure[0])
    if len(figure) < 2:
        return Interval(value, float("-inf"), float("inf"))
    low, high = figure[1:].nanquantile(figure.new_tensor([(1 - level) / 2, (1 + level) / 2])).tolist()
    return Interval(value, low, high)


def prompt_resamples(
    statistic: Callable[[Float[Tensor, "resample row"]], Float[Tensor, "resample figure"]],
    clusters: Sequence[str],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Float[Tensor, "resample figure"]:
    """Figures of all rows, and behind them those of each resample of whole clusters (prompts), in float64.

    Args:
        statistic: as for :func:`cluster_intervals`.
        clusters: N names; rows of equal name are drawn together.

    Returns:
        ``1 + n_resamples`` rows, the first one of all rows as they are; that one alone where there is a single cluster.

    Raises:
        ValueError: no rows.
    """
    if not len(clusters):
        raise ValueError("expected at least one row, got none")
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    found = [statistic(torch.ones(1, len(clusters), dtype=torch.float64))]
    rng = np.random.default_rng(seed)
    at_a_time = max(1, _WEIGHTS_AT_A_TIME // len(clusters))
    for start in range(0, n_resamples if len(names) > 1 else 0, at_a_time):
        count = min(at_a_time, n_resamples - start)
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)
        found.append(statistic(torch.from_numpy(drawn[:, index].astype(np.float64))))
    return torch.cat(found).to(torch.float64)
