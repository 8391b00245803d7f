import math

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.geometry.consistency import in_sample_cosines, leave_one_out_cosines, split_half
from tiltmeter.geometry.spectra import singular_values
from tiltmeter.stats.nulls import (
    noise_variance,
    parallel_analysis,
    sign_flip_null,
    signal_rank_correlated,
    signal_rank_white,
    split_half_null,
    tracy_widom_edge,
)


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_flipped_shift_share_is_one_over_n_on_average_whatever_the_rows() -> None:
    rows = noise(20, 5) * torch.arange(1.0, 21)[:, None] + 3
    null = sign_flip_null(rows, n_flips=20_000)
    assert float(null.shift_share.mean()) == pytest.approx(1 / 20, rel=0.03)
    assert sign_flip_null(noise(40, 5) + 3, n_flips=99).p_value == 0.01


def test_every_flip_is_measured_like_the_rows_themselves() -> None:
    rows = noise(6, 4)
    null = sign_flip_null(rows, n_flips=300, seed=5)
    generator = torch.Generator().manual_seed(5)
    signs = (
        torch.cat([torch.randint(0, 2, (n, 6), generator=generator, dtype=torch.float64) for n in (256, 44)]) * 2 - 1
    )
    for i in (0, 255, 256, 299):
        flipped = signs[i, :, None] * rows
        assert_close(null.mean_cosine_in_sample[i], in_sample_cosines(flipped).mean())
        assert_close(null.mean_cosine_leave_one_out[i], leave_one_out_cosines(flipped).mean())


def test_null_bands_hold_the_expected_cosines() -> None:
    n = 100
    null = sign_flip_null(noise(n, 300), n_flips=500)
    band = null.band(0.95)
    low, high = band["mean_cosine_in_sample"]
    assert low < 1 / math.sqrt(n) < high
    low, high = band["mean_cosine_leave_one_out"]
    assert low < 0 < high
    assert band["shift_share"][0] < 1 / n < band["shift_share"][1]


def test_p_values_are_uniform_under_the_null() -> None:
    values = [sign_flip_null(noise(12, 3, seed), n_flips=199, seed=seed).p_value for seed in range(400)]
    assert kstest(values, "uniform").pvalue > 0.01
    assert 0.02 < sum(p <= 0.05 for p in values) / len(values) < 0.09


@pytest.mark.parametrize(("n", "d"), [(600, 300), (200, 500), (300, 300)])
def test_edge_and_variance_are_those_of_noise(n: int, d: int) -> None:
    sigma = singular_values(3 * noise(n, d))
    largest = float(sigma[0].square() / n)
    assert largest == pytest.approx(9 * (1 + math.sqrt(d / n)) ** 2, rel=0.05), "Marchenko and Pastur's edge"
    assert largest < tracy_widom_edge(n, d, noise_variance=9.0) < 1.1 * largest
    assert noise_variance(sigma, n_rows=n, d_model=d) == pytest.approx(9, rel=0.02)


def test_spikes_and_the_mean_row_take_no_part_in_the_noise_variance() -> None:
    rows = 3 * noise(301, 200) + 50
    rows[:, :10] *= 8
    sigma = singular_values(rows - rows.mean(0))
    assert noise_variance(sigma, n_rows=300, d_model=200, n_spikes=10) == pytest.approx(9, rel=0.02)
    assert noise_variance(sigma, n_rows=300, d_model=200) == pytest.approx(9, rel=0.08), "the largest tenth is left out"


@pytest.mark.parametrize("spikes", [0, 1, 3])
def test_signal_ranks_count_spikes(spikes: int) -> None:
    directions = torch.linalg.qr(noise(200, 3, 3)).Q.T[:spikes]
    rows = noise(400, 200, 2) + 5 * noise(400, spikes, 4) @ directions
    sigma = singular_values(rows - rows.mean(0))
    assert signal_rank_white(sigma, n_rows=399, d_model=200) == spikes
    assert signal_rank_correlated(rows) == spikes


def test_one_wide_dimension_is_unequal_spread_and_no_signal() -> None:
    rows = noise(400, 200, 2)
    rows[:, 7] *= 30
    assert signal_rank_correlated(rows) == 0


def test_correlated_dimensions_are_signal_for_one_count_only() -> None:
    noises = noise(200, 100)
    rows = noises + noises.roll(1, 1)
    sigma = singular_values(rows - rows.mean(0))
    assert signal_rank_white(sigma, n_rows=199, d_model=100) > 10
    assert signal_rank_correlated(rows) == 0


def test_no_more_than_ten_directions_or_a_quarter_of_the_rows_are_counted() -> None:
    rows = noise(200, 100) + 30 * noise(200, 15, 1) @ torch.linalg.qr(noise(100, 15, 2)).Q.T
    assert signal_rank_correlated(rows) <= 10
    assert [signal_rank_correlated(noise(n, 50)) for n in (2, 3, 5)] == [0, 0, 0]


def test_halves_of_flipped_rows_agree_no_more_than_chance() -> None:
    shifted = noise(60, 30) + 1
    null, halves = split_half_null(shifted, n_flips=2000, n_splits=5), split_half(shifted, n_splits=5)
    for found, observed in (
        (null.mean_cosine, halves.mean_cosine),
        (null.cosine_of_means, halves.cosine_of_means),
    ):
        assert found.shape == (2000,)
        assert abs(float(found.mean())) < 4 * float(found.std()) / math.sqrt(2000)
        assert float(observed.min()) > float(found.max())


def test_a_flip_is_measured_by_the_same_splits_as_the_rows() -> None:
    """A flip that leaves all signs alike gives the observed figures themselves."""
    rows = noise(2, 30)
    null, observed = split_half_null(rows, n_flips=40, n_splits=3), split_half(rows, n_splits=3)
    same = (null.cosine_of_means - observed.cosine_of_means.mean()).abs() < 1e-12
    opposite = (null.cosine_of_means + observed.cosine_of_means.mean()).abs() < 1e-12
    assert (same | opposite).all()
    assert same.any()
    assert opposite.any()


def test_parallel_analysis_sees_dependence_but_not_unequal_spread() -> None:
    scales = torch.linspace(0.1, 5, 20, dtype=torch.float64)
    rows = noise(200, 20) * scales
    null = parallel_analysis(rows)
    assert int((singular_values(rows - rows.mean(0)) > null).sum()) == 0
    shared = rows + 4 * noise(200, 1, 1)
    assert int((singular_values(shared - shared.mean(0)) > parallel_analysis(shared)).sum()) == 1


def test_too_few_rows_are_refused_and_zeros_have_no_variance() -> None:
    with pytest.raises(ValueError, match="split_half_null: expected at least two rows, got 1"):
        split_half_null(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least two rows, got 1"):
        sign_flip_null(noise(1, 3))
    assert noise_variance(torch.zeros(3), n_rows=3, d_model=5) == 0
    assert math.isnan(noise_variance(torch.zeros(0), n_rows=3, d_model=5))
    assert signal_rank_white(torch.zeros(3), n_rows=3, d_model=5) == 0
    assert signal_rank_correlated(torch.zeros(9, 5)) == 0
