"""Equivalence by two one-sided tests (TOST, Schuirmann 1987): a figure shown to lie inside margins."""

import math
from typing import NamedTuple

import torch
from scipy.stats import t as student

from tiltmeter.stats.jackknife import LINEAR, Interval, Scale


class Equivalence(NamedTuple):
    """Outcome of the two tests."""

    p_value: float
    """The larger one of the two; NaN where there is no interval."""
    is_equivalent: bool
    """Both are at most the level: the figure lies between the margins."""


def equivalence(
    found: Interval,
    n_clusters: int,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    level: float = 0.05,
    interval_level: float = 0.95,
    scale: Scale = LINEAR,
) -> Equivalence:
    """Test whether a figure lies between two margins: H₀ says that it is at most ``low``, or at least ``high``.

    The same as an interval of 1 − 2·level inside (low, high). The error is that of the interval given: reach = t · error.

    Args:
        found: the figure with its jackknife interval over clusters (prompts).
        n_clusters: G; the tests have G − 1 degrees of freedom.
        low, high: margins, that is value − margin and value + margin; one of them may be infinite.
        level: of each of the two tests, and so of both.
        interval_level: of ``found``.
        scale: on which its interval is symmetric.

    Raises:
        ValueError: no margin, fewer than two clusters, or low not below high.

    >>> of_mean = Interval(0.0, -2.0 * 0.1, 2.0 * 0.1)
    >>> equivalence(of_mean, 61, low=-0.5, high=0.5).is_equivalent, equivalence(of_mean, 61, low=-0.1, high=0.1).is_equivalent
    (True, False)
    """
    if not low < high or (math.isinf(low) and math.isinf(high)) or n_clusters < 2:
        raise ValueError(
            f"equivalence: expected low below high, one of them finite, and two clusters, got {low}, {high}, {n_clusters}"
        )
    if math.isnan(found.value) or math.isnan(found.low):
        return Equivalence(math.nan, False)
    value, bottom, top, least, most = (_on(scale, x) for x in (found.value, found.low, found.high, low, high))
    error = max(value - bottom, top - value) / float(student.ppf((1 + interval_level) / 2, n_clusters - 1))
    gaps = [gap for gap in (value - least, most - value) if math.isfinite(gap)]
    errors = [gap / error if error else math.copysign(math.inf, gap or -1.0) for gap in gaps]
    p_value = max(float(student.sf(x, n_clusters - 1)) for x in errors)
    return Equivalence(p_value, p_value <= level)


def _on(scale: Scale, x: float) -> float:
    return x if math.isinf(x) else float(scale.to(torch.tensor(x, dtype=torch.float64)))
