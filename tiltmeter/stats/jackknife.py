"""Confidence intervals over prompts by leaving out one prompt at a time: the jackknife (Tukey 1958, Efron & Stein 1981).

A resample of the bootstrap holds rows twice. A row agrees with itself, so figures of products of rows (f, norms of means,
cosines of means, eigenvalues, distances of clouds) are too large there by about (1 − f)/N: their bootstrap intervals can lie
wholly beside the truth. Leaving rows out repeats none. docs/statistics.md says which interval belongs to which figure.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.special import stdtrit
from torch import Tensor

_WEIGHTS_AT_A_TIME = 4_000_000
_EPS = torch.finfo(torch.float64).eps
_MOST_PAIRS = 1000
"""Pairs of clusters left out together, at most, for the second-order part of the variance; more would not steady it."""

Statistic = Callable[[Float[Tensor, "resample row"]], Float[Tensor, "resample figure"]]


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """Columns of a table: NAME, NAME_low and NAME_high."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


NO_INTERVAL = Interval(math.nan, math.nan, math.nan)
"""Interval for a figure without a value: NaN at both ends."""


class Scale(NamedTuple):
    """A strictly rising function on which a figure is taken to be symmetric; the interval is carried back from there."""

    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


LINEAR = Scale(lambda x: x, lambda y: y)
COSINE = Scale(lambda x: torch.atanh(x.clamp(-1 + _EPS, 1 - _EPS)), torch.tanh)
"""Fisher's z, for −1 … 1."""
SHARE = Scale(lambda x: COSINE.to(x.clamp(min=0).sqrt()), lambda y: COSINE.back(y.clamp(min=0)).square())
"""Fisher's z of the root, for shares of energy 0 … 1 (f, ρ₁): they are squared cosines."""
LOG_ODDS = Scale(lambda x: COSINE.to(2 * x - 1), lambda y: (1 + COSINE.back(y)) / 2)
"""Half the log-odds, for probabilities 0 … 1."""
SQUARE = Scale(torch.square, lambda y: y.clamp(min=0).sqrt())
"""The square, for lengths 0 … ∞: their squares are sums of products of rows."""


def jackknife_interval(
    statistic: Callable[[Float[Tensor, "resample row"]], Float[Tensor, " resample"]],
    clusters: Sequence[str],
    *,
    level: float = 0.95,
    second_order: bool = False,
    scale: Scale = LINEAR,
) -> Interval:
    """One figure of N rows with an interval; arguments as :func:`jackknife_intervals`.

    >>> x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    >>> [round(end, 3) for end in jackknife_interval(lambda w: w @ x / w.sum(1), ["a", "b", "c"])]  # 2 ± t₂ · 1/√3
    [2.0, -0.484, 4.484]
    """

    def as_column(weights: Tensor) -> Tensor:
        return statistic(weights)[:, None]

    return jackknife_intervals(as_column, clusters, level=level, second_order=second_order, scale=scale)[0]


def jackknife_intervals(
    statistic: Statistic,
    clusters: Sequence[str],
    *,
    level: float = 0.95,
    second_order: bool = False,
    scale: Scale = LINEAR,
) -> list[Interval]:
    """Figures of N rows, smooth in how much each row counts, with intervals over whole clusters (prompts).

        estimate ± t_{G−1} · √V,    V = (G − 1)/G Σ_g (S₋g − S̄)²,    S₋g: without cluster g of G

    The interval is of the figure's mean over draws of as many prompts: what a small N adds (1/N to f), it adds to both.
    It takes G evaluations; with ``second_order`` up to 1000 more.

    Args:
        statistic: from how much each row counts (float64, on the CPU; 0 where left out), for several weightings at once, to a
            column a figure. Given ones it is the estimate. Example, norms of mean rows:
            ``lambda w: (w @ x / w.sum(1, True)).norm(dim=1, keepdim=True)``.
        clusters: N names; rows of equal name are left out together.
        level: of confidence.
        second_order: for figures of products of rows. Where their linear part vanishes (f near 0, no distance left) V is twice
            the variance; the excess is measured by leaving out pairs of clusters (Efron & Stein 1981) and taken off.
        scale: on which the interval is symmetric.

    Returns:
        In the order of the columns; infinite (carried back from the scale) with one cluster, NaN where the figure has no value.
        Clusters without which it has none are passed over.

    Raises:
        ValueError: no rows.
    """
    if not len(clusters):
        raise ValueError("expected at least one row, got none")
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    n = len(names)
    member = torch.from_numpy(index)
    values = _evaluate(statistic, torch.empty(1, 0, dtype=torch.int64), member)[0]
    whole = scale.to(values)
    if n < 2:
        ends = scale.back(torch.tensor([-math.inf, math.inf], dtype=torch.float64)).tolist()
        return [Interval(value, *ends) for value in values.tolist()]
    without = scale.to(_evaluate(statistic, torch.arange(n)[:, None], member))
    variance = jackknife_variance(without)
    if second_order and n > 3:
        pairs = _pairs(n)
        both = scale.to(_evaluate(statistic, pairs, member))
        mixed = n * whole - (n - 1) * without[pairs].sum(1) + (n - 2) * both
        variance = torch.maximum(variance - (n - 1) / (2 * n) * mixed.square().nanmean(0), variance / 2)
    reach = float(stdtrit(n - 1, (1 + level) / 2)) * variance.sqrt()
    low, high = torch.minimum(scale.back(whole - reach), values), torch.maximum(scale.back(whole + reach), values)
    return [Interval(*ends) for ends in zip(values.tolist(), low.tolist(), high.tolist(), strict=True)]


def interval_without_each(
    whole: Float[Tensor, ""], without: Float[Tensor, " cluster"], *, level: float = 0.95, scale: Scale = LINEAR
) -> Interval:
    """Interval of a figure whose values without each cluster are known already, such as by a closed form.

    Raises:
        ValueError: fewer than two clusters.

    >>> whole, without = torch.tensor(2.0).double(), torch.tensor([2.5, 2.0, 1.5]).double()
    >>> [round(end, 3) for end in interval_without_each(whole, without)]  # of the mean of 1, 2, 3
    [2.0, -0.484, 4.484]
    """
    if len(without) < 2:
        raise ValueError(f"interval_without_each: expected at least two clusters, got {len(without)}")
    value, at = float(whole), scale.to(whole)
    reach = float(stdtrit(len(without) - 1, (1 + level) / 2)) * jackknife_variance(scale.to(without)).sqrt()
    return Interval(value, min(float(scale.back(at - reach)), value), max(float(scale.back(at + reach)), value))


def jackknife_variance(without: Float[Tensor, "cluster ..."]) -> Float[Tensor, "..."]:
    """Variance of figures, (G − 1)/G Σ_g (S₋g − S̄)², from their values without each of G clusters; NaN ones are passed over.

    >>> x = torch.tensor([1.0, 2.0, 3.0])
    >>> jackknife_variance((x.sum() - x) / 2)  # of a mean: s²/N
    tensor(0.3333)
    """
    return (len(without) - 1) * (without - without.nanmean(0)).square().nanmean(0)


def without_each(clusters: Sequence[str]) -> Float[Tensor, "kept row"]:
    """Weights of the rows: all rows alike, and then without each cluster (prompt) in turn; of one cluster all rows alone.

    >>> without_each(["a", "b", "b"]).tolist()
    [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    left_out = torch.eye(len(names), dtype=torch.float64)[:, torch.from_numpy(index)]
    everything = torch.ones(1, len(index), dtype=torch.float64)
    return everything if len(names) < 2 else torch.cat([everything, 1 - left_out])


def cluster_mean_interval(values: Sequence[float], clusters: Sequence[str], *, level: float = 0.95) -> Interval:
    """Mean of values, Σ values / Σ counts, with a jackknife interval over whole clusters (prompts): Student's where each is one.

    Shares and means of bounded scores: :func:`tiltmeter.stats.proportions.share_interval`.

    Args:
        values: N figures, one a pair.
        clusters: N names; values of equal name are left out together.
        level: of confidence.

    Returns:
        Of width 0 where all values are equal, which then says no more than that.

    Raises:
        ValueError: no values, or lengths that differ.

    >>> cluster_mean_interval([1.0, 1.0, 1.0], ["a", "a", "b"])
    Interval(value=1.0, low=1.0, high=1.0)
    """
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"expected values and clusters of one length above 0, got {len(values)} and {len(clusters)}")
    mean = float(np.mean(values))
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    variance = ratio_variance(values, np.ones(len(values)), clusters)
    reach = float(stdtrit(len(set(clusters)) - 1, (1 + level) / 2)) * math.sqrt(variance)
    return Interval(mean, mean - reach, mean + reach)


def ratio_variance(sums: ArrayLike, counts: ArrayLike, clusters: Sequence[str]) -> float:
    """Variance of Σ sums / Σ counts over rows, by leaving out one cluster of rows at a time; infinite with one cluster.

    >>> round(ratio_variance([1.0, 2.0, 3.0], [1, 1, 1], ["a", "b", "c"]), 6)  # s²/N
    0.333333
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 2:
        return math.inf
    inside, counted = (np.bincount(index, weights=np.asarray(x, dtype=np.float64)) for x in (sums, counts))
    without = (inside.sum() - inside) / (counted.sum() - counted)
    return float((len(names) - 1) * without.var())


def _pairs(n: int) -> Int[Tensor, "pair 2"]:
    """All pairs of n clusters, or as many random ones as are enough."""
    pairs = torch.triu_indices(n, n, 1).T
    drawn = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:_MOST_PAIRS]
    return pairs[drawn]


def _evaluate(
    statistic: Statistic, left_out: Int[Tensor, "resample k"], member: Int[Tensor, " row"]
) -> Float[Tensor, "resample figure"]:
    """The statistic without the k clusters of each line, a chunk of weightings at a time."""
    n_clusters = int(member.max()) + 1
    found = []
    for part in left_out.split(max(1, _WEIGHTS_AT_A_TIME // len(member))):
        kept = torch.ones(len(part), n_clusters, dtype=torch.float64).scatter_(1, part, 0.0)
        found.append(statistic(kept[:, member]).to(torch.float64))
    return torch.cat(found)
