import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.geometry.consistency import in_sample_cosines, leave_one_out_cosines
from tiltmeter.geometry.moments import RowMoments
from tiltmeter.geometry.rows import VARIANTS, Variant, outlier_dims, row_geometry

FIRST = torch.tensor([0])
SHIFTED = [3, 40, 77, 126]


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(rows: Tensor, pieces: int = 1) -> RowMoments:
    moments = RowMoments(rows.shape[1])
    for piece in rows.tensor_split(pieces):
        moments.update(piece)
    return moments


@given(st.integers(2, 30), st.integers(2, 12), st.integers(1, 4), st.integers(0, 99))
def test_streamed_moments_equal_one_batch_and_a_merge_of_four(n: int, d: int, pieces: int, seed: int) -> None:
    rows = noise(n, d, seed) + 3 * noise(1, d, seed + 1)
    merged = RowMoments(d)
    for part in rows.tensor_split(4):
        merged.merge(moments_of(part))
    centred = rows - rows.mean(0)
    for moments in (moments_of(rows), moments_of(rows, pieces), merged):
        assert moments.n_rows == n
        assert_close(moments.mean(), rows.mean(0), rtol=1e-12, atol=1e-12)
        assert_close(moments.scatter(), centred.T @ centred, rtol=1e-12, atol=1e-11)


def test_a_mean_of_a_million_at_deviation_one_survives() -> None:
    rows = noise(400, 6)
    moments = RowMoments(6)
    for part in (rows + 1e6).split(37):
        moments.merge(moments_of(part))
    assert_close(moments.scatter(), 399 * rows.T.cov(), rtol=1e-7, atol=1e-7)


def test_more_rows_than_are_added_at_a_time_are_all_added() -> None:
    rows = noise(2500, 3)
    assert_close(moments_of(rows).scatter(), 2499 * rows.T.cov())


def test_what_is_given_out_is_a_copy_and_other_widths_are_refused() -> None:
    moments = moments_of(noise(5, 4))
    moments.scatter().zero_()
    moments.mean().zero_()
    assert_close(moments.scatter(), 4 * noise(5, 4).T.cov())
    assert_close(moments.mean(), noise(5, 4).mean(0))
    with pytest.raises(ValueError, match="expected rows of width 4, got 3"):
        moments.update(noise(2, 3))


def test_only_constant_length_rows_have_a_share_equal_to_the_squared_mean_cosine() -> None:
    rows = noise(50, 9) + 1
    rows = 4 * rows / rows.norm(dim=1, keepdim=True)
    g = row_geometry(rows)
    assert g.shift_share == pytest.approx(g.mean_cosine_in_sample**2)


@given(st.integers(2, 20), st.integers(2, 9), st.floats(0, 4), st.integers(0, 99))
def test_the_first_direction_holds_at_least_the_shift(n: int, d: int, shift: float, seed: int) -> None:
    g = row_geometry(noise(n, d, seed) + shift)
    assert g.spectrum.top1_energy >= g.shift_share - 1e-9
    if g.shift_share > 0.5:
        assert g.cos_top_mean**2 >= g.shift_share - 1e-9


def test_multiples_of_one_vector_are_rank_one_with_the_share_worked_out() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=torch.float64)
    g = row_geometry(torch.outer(a, noise(1, 7)[0]))
    assert g.shift_share == pytest.approx(float(a.mean() ** 2 / a.square().mean()))
    assert g.spectrum.top1_energy == pytest.approx(1)
    assert g.spectrum.entropy_energy == pytest.approx(0, abs=1e-9)
    assert g.cos_top_mean == pytest.approx(1)


@pytest.mark.parametrize("c", [0.5, 3.0])
def test_a_shift_plus_orthonormal_noise_has_the_spectrum_worked_out(c: float) -> None:
    n, d = 6, 10
    rows = torch.zeros(n, d, dtype=torch.float64)
    rows[:, 0] = c
    rows[:, 1 : n + 1] = torch.eye(n, dtype=torch.float64)
    g = row_geometry(rows)
    first, total = n * c**2 + 1, n * c**2 + n
    assert g.spectrum.top1_energy == pytest.approx(first / total)
    assert g.spectrum.sigma_ratio == pytest.approx(1 / math.sqrt(first))
    assert g.spectrum.participation_ratio == pytest.approx(total**2 / (first**2 + n - 1))
    assert g.shift_share == pytest.approx((c**2 + 1 / n) / (c**2 + 1))
    cosine = (c**2 + 1 / n) / math.sqrt((c**2 + 1) * (c**2 + 1 / n))
    assert g.mean_cosine_in_sample == pytest.approx(cosine)
    assert g.cos_top_mean == pytest.approx(1)
    assert_close(in_sample_cosines(rows), torch.full((n,), cosine, dtype=torch.float64))


def test_four_shifted_dimensions_pass_for_a_direction_until_they_are_removed() -> None:
    base = noise(400, 128)
    base[:, SHIFTED] += 40
    update = noise(400, 128, 1)
    update[:, SHIFTED] += 20
    without, told = outlier_dims(base)
    assert without.tolist() == SHIFTED
    for rows in (base, base + update, update):
        raw, removed = row_geometry(rows), row_geometry(rows[told], "outlier_dims_removed", without=without)
        assert raw.mean_cosine_in_sample > 0.95
        assert removed.mean_cosine_in_sample < 0.1
        assert abs(removed.mean_cosine_leave_one_out) < 0.05
        assert removed.spectrum.d_model == 124


def test_outliers_of_noise_are_few() -> None:
    n_found = [len(outlier_dims(noise(96, 1024, seed) * scale)[0]) for seed in range(20) for scale in (1e-3, 1.0)]
    assert sum(n_found) <= 8  # 40 × 1024 dimensions at 5e-5 each: 2 expected


def test_outlier_dims_are_chosen_on_rows_left_out_of_the_figures() -> None:
    base = noise(30, 64)
    base[10:, 5] += 100
    without, told = outlier_dims(base)
    assert 5 not in without.tolist()
    assert len(base[told]) == 20


def test_removing_outlier_dims_without_naming_them_is_refused() -> None:
    with pytest.raises(ValueError, match="dimensions to leave out"):
        row_geometry(noise(4, 8), "outlier_dims_removed")


def test_the_mean_cosine_is_the_mean_of_the_cosines() -> None:
    rows = noise(30, 8) + 0.3
    g = row_geometry(rows)
    assert g.mean_cosine_in_sample == pytest.approx(float(in_sample_cosines(rows).mean()))
    assert g.mean_cosine_leave_one_out == pytest.approx(float(leave_one_out_cosines(rows).mean()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_without_a_direction_give_nan_and_no_crash(variant: Variant) -> None:
    same = torch.full((5, 4), 0.1, dtype=torch.float64)
    for rows in (torch.zeros(5, 4), torch.zeros(1, 4), same, torch.full((5, 4), torch.nan)):
        g = row_geometry(rows, variant, without=FIRST)
        if rows is not same or variant == "centred":
            assert math.isnan(g.spectrum.entropy_energy)
            assert math.isnan(g.cos_top_mean)
        else:
            assert g.shift_share == pytest.approx(1)
    assert row_geometry(noise(1, 4)).spectrum.normalized_entropy_energy == 0


def test_a_matrix_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one row"):
        row_geometry(torch.empty(0, 4))
