"""How often the interval of the constant share over texts, several tokens each, holds its mean over draws."""

import numpy as np
import pytest
import torch

from tests.calibration.coverage import monte_carlo_band
from tiltmeter.geometry.traces import constant_share

pytestmark = pytest.mark.slow
N_SETS, N_TOKENS, WIDTH = 300, 5, 12


def draw_updates(draw: np.random.Generator, n_texts: int, shift: float) -> torch.Tensor:
    """A shift of the given length in all rows, a part that the tokens of a text share, and one of each token."""
    of_text = np.repeat(draw.normal(0, 1, (n_texts, WIDTH)), N_TOKENS, axis=0)
    rows = 0.6 * of_text + draw.normal(0, 1, (n_texts * N_TOKENS, WIDTH))
    rows[:, 0] += shift
    return torch.tensor(rows)


@pytest.mark.parametrize("shift", [1.0, 4.0])
@pytest.mark.parametrize("n_texts", [16, 64])
def test_coverage_of_the_constant_share_over_texts(n_texts: int, shift: float) -> None:
    draw = np.random.default_rng(0)
    groups = [str(i // N_TOKENS) for i in range(n_texts * N_TOKENS)]
    found = [constant_share(draw_updates(draw, n_texts, shift), groups) for _ in range(N_SETS)]
    truth = float(np.mean([interval.value for interval in found]))
    held = sum(interval.low <= truth <= interval.high for interval in found)
    low, high = monte_carlo_band(0.925, 0.99, n_sets=N_SETS)
    assert low <= held / N_SETS <= high, held
