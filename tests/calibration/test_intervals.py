"""How often intervals hold the truth, by simulation: every world of benchmarks/coverage.py, in fewer sets."""

import pytest

from benchmarks.coverage import WORLDS, World, real_coverage
from tests.calibration.coverage import monte_carlo_band

pytestmark = pytest.mark.slow
N_SETS = 300


CASES = [(w, n) for w in WORLDS for n in w.sizes if n < 200 or w.truth is not None]
"""All but the slowest, which the benchmark itself has."""


@pytest.mark.parametrize(("world", "n"), [pytest.param(*case, id=f"{case[0].name}, {case[1]}") for case in CASES])
def test_coverage(world: World, n: int) -> None:
    """93 to 97 %; of shares at least 93: they are counts, whose intervals may be wide, never narrow."""
    (found,) = real_coverage(world, n, n_sets=N_SETS)
    low, high = monte_carlo_band(0.93, world.most, n_sets=N_SETS)
    assert low <= found <= high, found
