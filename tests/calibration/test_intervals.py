"""How often intervals hold the truth, by simulation: every world of benchmarks/coverage.py, in fewer sets."""

import pytest

from benchmarks.coverage import WORLDS, World, real_coverage
from tests.calibration.coverage import monte_carlo_band

pytestmark = pytest.mark.slow
N_SETS = 300


@pytest.mark.parametrize(("world", "n"), [pytest.param(w, n, id=f"{w.name}, {n}") for w in WORLDS for n in w.sizes])
def test_coverage(world: World, n: int) -> None:
    """93 to 97 %; of shares, and of f where there is hardly a shift, at least 93: their intervals may be wide, never narrow."""
    (found,) = real_coverage(world, n, n_sets=N_SETS)
    low, high = monte_carlo_band(0.93, world.most, n_sets=N_SETS)
    assert low <= found <= high, found
