"""How often the agreement of halves of noise lies outside its own null, by simulation."""

import pytest
import torch
from torch import Tensor

from tests.calibration.coverage import monte_carlo_band
from tiltmeter.geometry.consistency import split_half
from tiltmeter.stats.nulls import split_half_null

pytestmark = pytest.mark.slow
N_SETS, N_FLIPS, N_SPLITS = 300, 199, 4


def noise(seed: int, *, n: int = 24, d: int = 12, heavy: bool) -> Tensor:
    """Symmetric rows, of equal or very unequal length."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return rows / torch.rand(n, 1, generator=generator, dtype=torch.float64) if heavy else rows


@pytest.mark.parametrize("heavy", [False, True])
def test_one_set_of_noise_in_twenty_lies_outside_its_null(heavy: bool) -> None:
    outside = torch.zeros(2)
    for seed in range(N_SETS):
        rows = noise(seed, heavy=heavy)
        observed, null = split_half(rows, n_splits=N_SPLITS), split_half_null(rows, n_flips=N_FLIPS, n_splits=N_SPLITS)
        for i, (value, flipped) in enumerate(
            ((observed.mean_cosine.mean(), null.mean_cosine), (observed.cosine_of_means.mean(), null.cosine_of_means))
        ):
            low, high = flipped.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
            outside[i] += not low <= value <= high
    low, high = monte_carlo_band(0.03, 0.06, n_sets=N_SETS)
    for rate in (outside / N_SETS).tolist():
        assert low <= rate <= high, rate


def test_a_common_direction_lies_outside() -> None:
    rows = noise(0, heavy=False) + 0.8
    null = split_half_null(rows, n_flips=N_FLIPS, n_splits=N_SPLITS)
    assert float(split_half(rows, n_splits=N_SPLITS).mean_cosine.mean()) > float(null.mean_cosine.max())
