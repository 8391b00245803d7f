"""How often the interval of the share of divergence in the first tokens holds the truth."""

import numpy as np
import pytest
import torch

from tests.calibration.coverage import monte_carlo_band
from tiltmeter.scoring.depth import FIRST_TOKENS, first_token_share

pytestmark = pytest.mark.slow
N_SETS = 300


def response(draw: np.random.Generator, early: float) -> torch.Tensor:
    """Divergences of 30 tokens, exponential, a scale of its own; the first tokens ``early`` times the others."""
    kl = draw.exponential(1.0, 30) * np.exp(draw.normal(0, 0.5))
    kl[:FIRST_TOKENS] *= early
    return torch.tensor(kl)


@pytest.mark.parametrize("early", [0.5, 1.0, 20.0])
@pytest.mark.parametrize("n", [16, 64])
def test_coverage_of_the_share_of_divergence_in_the_first_tokens(n: int, early: float) -> None:
    draw, groups = np.random.default_rng(0), [str(i) for i in range(n)]
    truth = FIRST_TOKENS * early / (FIRST_TOKENS * early + 30 - FIRST_TOKENS)
    found = [first_token_share([response(draw, early) for _ in range(n)], groups) for _ in range(N_SETS)]
    held = sum(interval.low <= truth <= interval.high for interval in found)
    low, high = monte_carlo_band(0.93, 0.985, n_sets=N_SETS)
    assert low <= held / N_SETS <= high, held
