"""How often the interval of the share of a change that is kept under shift holds the truth."""

import numpy as np
import pytest

from tests.calibration.coverage import monte_carlo_band
from tiltmeter.scoring.shift import share_kept

pytestmark = pytest.mark.slow
N_SETS = 600


@pytest.mark.parametrize("kept", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("same_pairs", [True, False], ids=["the same pairs", "another corpus"])
@pytest.mark.parametrize("n", [16, 64])
def test_coverage_of_the_share_kept(n: int, same_pairs: bool, kept: float) -> None:
    """Changes of 2 nats with a spread of 1.5 that the same pairs have in common, two pairs a prompt."""
    draw, held = np.random.default_rng(0), 0
    names, others = ([f"{kind}{i // 2}" for i in range(n)] for kind in ("a", "a" if same_pairs else "b"))
    for _ in range(N_SETS):
        of_pair = draw.normal(2.0, 1.5, n)
        usual = of_pair + draw.normal(0, 0.5, n)
        under = kept * (of_pair if same_pairs else draw.normal(2.0, 1.5, n)) + draw.normal(0, 0.5, n)
        found = share_kept(under.tolist(), others, usual.tolist(), names)
        held += found.low <= kept <= found.high
    low, high = monte_carlo_band(0.93, 0.985, n_sets=N_SETS)
    assert low <= held / N_SETS <= high, held / N_SETS
