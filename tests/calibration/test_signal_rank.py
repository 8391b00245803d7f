"""How often noise of any kind is called signal, and planted directions are counted exactly, by simulation."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.calibration.coverage import Z, monte_carlo_band
from tiltmeter.geometry.spectra import singular_values
from tiltmeter.stats import nulls
from tiltmeter.stats.nulls import signal_rank_correlated, signal_rank_white

pytestmark = pytest.mark.slow
N_SETS = 300

Noise = Callable[[np.random.Generator, int, int], np.ndarray]


def white(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Independent, equal dimensions."""
    return rng.normal(size=(n, d))


def correlated(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Neighbouring dimensions have a correlation of .5, falling off geometrically (AR(1))."""
    x = rng.normal(size=(n, d))
    for j in range(1, d):
        x[:, j] = 0.5 * x[:, j - 1] + 0.75**0.5 * x[:, j]
    return x


def heavy_tailed(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Entries of Student's distribution with 3 degrees of freedom."""
    return rng.standard_t(3, size=(n, d))


def rows_of_unequal_length(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Normal rows, each times a factor of its own: a multivariate Student distribution with 3 degrees of freedom."""
    return rng.normal(size=(n, d)) / np.sqrt(rng.chisquare(3, size=(n, 1)) / 3)


NOISES: tuple[Noise, ...] = (white, correlated, heavy_tailed, rows_of_unequal_length)


def white_rank(rows: Tensor) -> int:
    """Rank against white noise, as reports have it."""
    sigma = singular_values(rows - rows.mean(0))
    return signal_rank_white(sigma, n_rows=len(rows) - 1, d_model=rows.shape[1])


def share_above_0(rank: Callable[[Tensor], int], noise: Noise, n: int, d: int) -> float:
    """Share of sets of noise in which something is called signal."""
    rng = np.random.default_rng(0)
    return float(np.mean([rank(torch.from_numpy(noise(rng, n, d))) > 0 for _ in range(N_SETS)]))


@pytest.mark.parametrize(("noise", "n", "d"), [*((noise, 128, 64) for noise in NOISES), (correlated, 64, 128)])
def test_noise_is_rarely_signal_whatever_its_covariance_and_tails(noise: Noise, n: int, d: int) -> None:
    limit = monte_carlo_band(0.0, 0.06, n_sets=N_SETS)[1]
    assert share_above_0(signal_rank_correlated, noise, n, d) <= limit


@pytest.mark.parametrize(("n", "d"), [(128, 64), (64, 128)])
def test_white_noise_is_rarely_signal_by_the_count_for_white_noise(n: int, d: int) -> None:
    assert share_above_0(white_rank, white, n, d) <= monte_carlo_band(0.0, 0.06, n_sets=N_SETS)[1]


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize(
    ("rank", "noise"), [(white_rank, white), (signal_rank_correlated, white), (signal_rank_correlated, correlated)]
)
def test_planted_directions_are_counted_exactly(rank: Callable[[Tensor], int], noise: Noise, k: int) -> None:
    """N = 512, d = 256, each direction 4 to 8 times as spread as a dimension of noise."""
    rng, n, d, n_sets = np.random.default_rng(1), 512, 256, 40
    hits = 0
    for _ in range(n_sets):
        directions = np.linalg.qr(rng.normal(size=(d, k)))[0]
        scores = rng.normal(size=(n, k)) * np.linspace(4, 8, k)
        hits += rank(torch.from_numpy(noise(rng, n, d) + scores @ directions.T)) == k
    assert hits / n_sets >= 0.9 - Z * (0.9 * 0.1 / n_sets) ** 0.5


def test_quantiles_of_gaps_are_those_of_white_noise() -> None:
    """The constants in the code, drawn again at their size: 31 independent rows of 64."""
    rng, n_values = np.random.default_rng(2), len(nulls._GAP_95)
    at = torch.arange(n_values)
    rows = torch.from_numpy(rng.normal(size=(4000, 32, 64)))
    signs = torch.nn.functional.normalize(rows, dim=2)
    ell = torch.linalg.eigvalsh((signs - signs.mean(1, keepdim=True)) @ (signs - signs.mean(1, keepdim=True)).mT).flip(
        1
    )
    gaps = (ell[:, at] - ell[:, at + 1]) / (ell[:, at + 1] - ell[:, at + 1 + nulls._GAP_SPAN])
    found = gaps.cummax(1).values.quantile(0.95, dim=0)
    assert found.numpy() == pytest.approx(np.array(nulls._GAP_95), rel=0.03)
