"""Real error rates by simulation, and how far chance moves them."""

import math
from collections.abc import Callable

from tiltmeter.stats.jackknife import Interval

Z = 2.6
"""Standard errors of a simulated rate that are put down to chance: 1 in 100 tests of a right rate would fail."""


def prompt_names(n: int, *, rows_each: int = 1) -> list[str]:
    """Names of n clusters for ``n · rows_each`` rows."""
    return [str(i // rows_each) for i in range(n * rows_each)]


def coverage(interval: Callable[[int], Interval], truth: float, *, n_sets: int) -> float:
    """Share of simulated sets, each made from its number as the seed, whose interval holds the truth.

    An interval that does not hold its own estimate fails at once.
    """
    hits = 0
    for seed in range(n_sets):
        value, low, high = interval(seed)
        assert low <= value <= high, f"set {seed}: {value} is outside {low} … {high}"
        hits += low - 1e-12 <= truth <= high + 1e-12
    return hits / n_sets


def monte_carlo_band(low: float, high: float, *, n_sets: int, rate: float = 0.95) -> tuple[float, float]:
    """Ends between which a simulated rate must lie for the real one to be within low … high, chance allowed for."""
    reach = Z * math.sqrt(rate * (1 - rate) / n_sets)
    return low - reach, high + reach
