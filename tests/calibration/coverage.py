"""How far chance moves a simulated rate."""

import math

Z = 2.6
"""Standard errors of a simulated rate that are put down to chance: 1 in 100 tests of a right rate would fail."""


def monte_carlo_band(low: float, high: float, *, n_sets: int, rate: float = 0.95) -> tuple[float, float]:
    """Ends between which a simulated rate must lie for the real one to be within low … high, chance allowed for."""
    reach = Z * math.sqrt(rate * (1 - rate) / n_sets)
    return low - reach, high + reach
