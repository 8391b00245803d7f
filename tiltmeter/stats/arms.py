"""One figure in the runs of an arm, and between arms: what is chance of seeds, and what is chance of prompts.

An arm of a study is a few runs (seeds) or draws of one kind. Its figure T varies for two reasons, the seed and the prompts that T
is told of, and a statement has to hold for both: intervals are the wider of Student's over runs and the jackknife's over prompts,
p-values the larger one (docs/statistics.md has the error rates; tests/calibration simulates them).
"""

import math
from typing import NamedTuple

from jaxtyping import Float
from scipy.special import ndtr, ndtri, stdtr, stdtrit
from torch import Tensor

from tiltmeter.stats.jackknife import Interval, jackknife_variance


class Arm(NamedTuple):
    """T of each run of an arm."""

    values: Float[Tensor, "resample run"]
    """First on all prompts, then without each of them (:func:`tiltmeter.stats.jackknife.without_each`); a single row: prompts are
    left out of account."""
    is_population: bool = False
    """True for draws of which a further one could be the truth (random weights, random vectors); runs of an arm estimate a mean."""
    error_of_prompts: float = 0.0
    """Standard error of the mean over prompts, where T without each of them is not known but this is."""

    @property
    def n_runs(self) -> int:
        """Runs or draws."""
        return self.values.shape[1]

    @property
    def mean(self) -> float:
        """Mean of T over the runs, on all prompts."""
        return float(self.values[0].mean())


class Difference(NamedTuple):
    """Mean of T in one arm less that in another."""

    interval: Interval
    p_greater: float
    """One-sided p-value of the first arm's T being no larger than the other's."""
    n_runs: int
    """Runs or draws of the other arm."""


def arm_interval(arm: Arm, *, level: float = 0.95) -> Interval:
    """Mean of T over an arm's runs: the wider of Student's interval over runs and the jackknife's over prompts.

    >>> import torch
    >>> arm_interval(Arm(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))).low < -0.4
    True
    """
    tail, n = (1 - level) / 2, arm.n_runs
    reaches = [_reach_of_prompts(arm.values.mean(1), tail), float(ndtri(1 - tail)) * arm.error_of_prompts]
    if n > 1:
        reaches.append(_quantile(n - 1.0, tail) * float(arm.values[0].std()) / math.sqrt(n))
    reach = max(reaches)
    return Interval(arm.mean, arm.mean - reach, arm.mean + reach)


def arm_difference(own: Arm, other: Arm, *, paired: bool = False, level: float = 0.95) -> Difference:
    """Difference of T between two arms that were asked about the same prompts.

    Over runs: paired, one sample of differences; else Welch's t test, where an arm with a single run is taken to vary as the other
    one does, and a further draw of a population (:attr:`Arm.is_population`) has to be passed, not its mean.
    Over prompts: the jackknife of the difference of means; where only standard errors are known, both arms' as if of other
    prompts, which is on the safe side.

    Args:
        paired: the two arms' figures are of the same runs, in one order.

    Raises:
        ValueError: two arms of one run each, of which no spread can be told, or other prompts.
    """
    if len(own.values) != len(other.values):
        raise ValueError(f"arm_difference: expected the same prompts, got {len(own.values)} and {len(other.values)}")
    error, freedom = _paired_error(own, other) if paired else _welch_error(own, other)
    difference, tail = own.values.mean(1) - other.values.mean(1), (1 - level) / 2
    value = float(difference[0])
    of_prompts = 0.0 if paired else math.hypot(own.error_of_prompts, other.error_of_prompts)
    reaches = [
        _quantile(freedom, tail) * error,
        _reach_of_prompts(difference, tail),
        float(ndtri(1 - tail)) * of_prompts,
    ]
    reach = max(reaches)
    p_values = [_p_greater(value, error, freedom)]
    if of_prompts > 0:
        p_values.append(float(ndtr(-value / of_prompts)))
    if len(difference) > 2:
        p_values.append(_p_greater(value, math.sqrt(float(jackknife_variance(difference[1:]))), len(difference) - 2.0))
    return Difference(Interval(value, value - reach, value + reach), max(p_values), other.n_runs)


def _paired_error(own: Arm, other: Arm) -> tuple[float, float]:
    difference = own.values[0] - other.values[0]
    if len(difference) < 2:
        raise ValueError("arm_difference: expected at least two runs, of which a spread can be told")
    return float(difference.std()) / math.sqrt(len(difference)), len(difference) - 1.0


def _welch_error(own: Arm, other: Arm) -> tuple[float, float]:
    n, m = own.n_runs, other.n_runs
    if max(n, m) < 2:
        raise ValueError("arm_difference: expected at least two runs in one of the arms, of which a spread can be told")
    spreads = [float(arm.values[0].var()) if arm.n_runs > 1 else None for arm in (own, other)]
    first, second = (x if x is not None else next(y for y in spreads if y is not None) for x in spreads)
    parts = first / n, second * (1 + 1 / m if other.is_population else 1 / m)
    total = sum(parts)
    weights = [part**2 / (k - 1) for part, k in zip(parts, (n, m), strict=True) if k > 1]
    if total == 0:
        return 0.0, max(n, m) - 1.0
    if min(n, m) == 1:
        return math.sqrt(total), max(n, m) - 1.0
    return math.sqrt(total), total**2 / sum(weights)


def _quantile(freedom: float, tail: float) -> float:
    return float(stdtrit(freedom, 1 - tail))


def _reach_of_prompts(values: Tensor, tail: float) -> float:
    """Half the width of the jackknife's interval; 0 where prompts are left out of account."""
    n_prompts = len(values) - 1
    if n_prompts < 2:
        return 0.0
    return _quantile(n_prompts - 1.0, tail) * math.sqrt(float(jackknife_variance(values[1:])))


def _p_greater(value: float, error: float, freedom: float) -> float:
    if error == 0:
        return 0.0 if value > 0 else 1.0
    return float(stdtr(freedom, -value / error))
