import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.geometry.consistency import in_sample_cosines, leave_one_out_cosines
from tiltmeter.geometry.moments import _ROWS_PER_FOLD, MATRICES, RowMoments, UpdateMoments
from tiltmeter.geometry.rows import VARIANTS, RowGeometry, Variant, outlier_dims, row_geometry

FIRST = torch.tensor([0])
SHIFTED = [3, 40, 77, 126]
KEPT, FOLDED = 10_000, 0
folds = st.sampled_from([KEPT, FOLDED, 7])


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(rows: Tensor, max_rows_kept: int, pieces: int = 1) -> RowMoments:
    moments = RowMoments(rows.shape[1], unit_rows=True, max_rows_kept=max_rows_kept)
    for piece in rows.tensor_split(pieces):
        moments.update(piece)
    return moments


def over_ranks(parts: list[RowMoments]) -> list[RowMoments]:
    """What all_reduce gives on each rank: calls are replayed until every one of the sums is known."""
    known: list[Tensor] = []
    while True:
        asked: list[Tensor] = []

        def reducer(seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
            step = iter(range(10))

            def reduce(x: Tensor) -> Tensor:
                i = next(step)
                if i < len(known):
                    return known[i].clone()
                seen.append(x.clone())
                raise StopIteration

            return reduce

        results = []
        for rank, part in enumerate(parts):
            try:
                results.append(part.all_reduce(reducer(asked), rank=rank, world_size=len(parts)))
            except StopIteration:
                continue
        if len(results) == len(parts):
            return results
        assert len(asked) == len(parts), "every rank has to take part in the same collectives"
        known.append(torch.stack(asked).sum(0))


def flat(geometry: RowGeometry) -> list[float]:
    return [*geometry.spectrum, *geometry[1:5]]


def assert_same(a: RowGeometry, b: RowGeometry, tolerance: float, leave_out_last: bool = False) -> None:
    end = -1 if leave_out_last else None
    assert_close(a.singular_values, b.singular_values, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert flat(a)[:end] == pytest.approx(flat(b)[:end], rel=tolerance, abs=tolerance, nan_ok=True)


@given(st.integers(2, 30), st.integers(2, 12), st.integers(1, 4), folds, st.integers(0, 99))
def test_streamed_moments_equal_one_batch_and_a_merge_of_four_ranks(
    n: int, d: int, pieces: int, kept: int, seed: int
) -> None:
    rows = noise(n, d, seed) + 3 * noise(1, d, seed + 1)
    whole = moments_of(rows, kept)
    streamed = moments_of(rows, kept, pieces)
    merged = RowMoments(d, unit_rows=True, max_rows_kept=kept)
    ranks = [moments_of(part, kept) for part in rows.tensor_split(4)]
    reduced = over_ranks(ranks)
    for rank in ranks:
        merged.merge(rank)
    for other in (streamed, merged, *reduced):
        assert other.n_rows == n
        assert other.keeps_rows == (n <= kept)
        assert_close(other.mean(), whole.mean(), rtol=1e-12, atol=1e-12)
        if other.keeps_rows:
            assert_close(other.rows, rows, rtol=0, atol=0)
        else:
            for mine, expected in zip(other._fold(), whole._fold(), strict=True):
                assert_close(mine.scatter, expected.scatter, rtol=1e-12, atol=1e-12)
                assert_close(mine.mean, expected.mean, rtol=1e-12, atol=1e-12)
        for variant in VARIANTS:
            assert_same(other.geometry(variant, without=FIRST), whole.geometry(variant, without=FIRST), 1e-6)


@given(st.integers(2, 30), st.integers(2, 12), st.integers(0, 99))
def test_folded_rows_give_the_figures_of_kept_rows(n: int, d: int, seed: int) -> None:
    rows = noise(n, d, seed) + 2
    kept, folded = moments_of(rows, KEPT), moments_of(rows, FOLDED, 3)
    for variant in VARIANTS:
        a, b = (moments.geometry(variant, without=FIRST) for moments in (kept, folded))
        assert math.isnan(b.mean_cosine_leave_one_out)
        if variant == "outlier_dims_removed":
            assert math.isnan(b.mean_cosine_in_sample)
            a = a._replace(mean_cosine_in_sample=math.nan)
        if a.spectrum.sigma_ratio < 0.999 or variant != "centred":
            assert_same(a, b, 1e-6, leave_out_last=True)
        assert_same(row_geometry(rows, variant, without=FIRST), kept.geometry(variant, without=FIRST), 1e-12)


@pytest.mark.parametrize("kept", [KEPT, FOLDED])
def test_a_mean_of_a_million_at_deviation_one_survives(kept: int) -> None:
    centred = noise(400, 6)
    rows = centred + 1e6
    expected = row_geometry(centred, "centred")
    moments = RowMoments(6, max_rows_kept=kept)
    for part in rows.split(37):
        other = RowMoments(6, max_rows_kept=kept)
        other.update(part)
        moments.merge(other)
    assert_same(moments.geometry("centred"), expected, 1e-7, leave_out_last=True)
    if kept == FOLDED:
        scatter = moments._fold().plain.scatter
        exact = centred - centred.mean(0)
        assert_close(scatter, exact.T @ exact, rtol=1e-7, atol=1e-7)


def test_memory_does_not_grow_with_rows_once_folded() -> None:
    moments = RowMoments(8, unit_rows=True, max_rows_kept=20)

    def numbers_held() -> int:
        tensors = [*moments._kept]
        for part in moments._folded or ():
            tensors += [part.mean, part.scatter]
        return sum(x.untyped_storage().nbytes() // 8 for x in tensors)

    most = 0
    for _ in range(300):
        moments.update(noise(5, 8))
        most = max(most, numbers_held())
    assert moments.n_rows == 1500
    assert most <= 2 * (8 + 8 * 8) + 8 * (_ROWS_PER_FOLD + 5)
    moments.geometry()
    assert numbers_held() == 2 * (8 + 8 * 8)


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


@pytest.mark.parametrize("kept", [KEPT, FOLDED])
def test_multiples_of_one_vector_are_rank_one_with_the_share_worked_out(kept: int) -> None:
    a = torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=torch.float64)
    g = moments_of(torch.outer(a, noise(1, 7)[0]), kept).geometry()
    assert g.shift_share == pytest.approx(float(a.mean() ** 2 / a.square().mean()))
    assert g.spectrum.top1_energy == pytest.approx(1)
    assert g.spectrum.entropy_energy == pytest.approx(0, abs=1e-9)
    assert g.cos_top_mean == pytest.approx(1)


@pytest.mark.parametrize("kept", [KEPT, FOLDED])
@pytest.mark.parametrize("c", [0.5, 3.0])
def test_a_shift_plus_orthonormal_noise_has_the_spectrum_worked_out(kept: int, c: float) -> None:
    n, d = 6, 10
    rows = torch.zeros(n, d, dtype=torch.float64)
    rows[:, 0] = c
    rows[:, 1 : n + 1] = torch.eye(n, dtype=torch.float64)
    g = moments_of(rows, kept).geometry()
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
        folded = moments_of(rows[told], FOLDED).geometry("outlier_dims_removed", without=without)
        assert_same(folded._replace(mean_cosine_in_sample=0), removed._replace(mean_cosine_in_sample=0), 1e-6, True)


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


@pytest.mark.parametrize("kept", [KEPT, FOLDED])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_without_a_direction_give_nan_and_no_crash(kept: int, variant: Variant) -> None:
    same = torch.full((5, 4), 0.1, dtype=torch.float64)
    for rows in (torch.zeros(5, 4), torch.zeros(1, 4), same, torch.full((5, 4), torch.nan)):
        g = moments_of(rows, kept).geometry(variant, without=FIRST)
        if rows is not same or variant == "centred":
            assert math.isnan(g.spectrum.entropy_energy)
            assert math.isnan(g.cos_top_mean)
        else:
            assert g.shift_share == pytest.approx(1)
    assert moments_of(noise(1, 4), kept).geometry().spectrum.normalized_entropy_energy == 0


def test_update_moments_hold_the_difference_and_both_sides() -> None:
    base, policy = noise(20, 6).to(torch.bfloat16), noise(20, 6, 1).to(torch.bfloat16)
    moments = UpdateMoments(6)
    for a, b in zip(base.split(6), policy.split(6), strict=True):
        moments.update(a, b)
    assert tuple(moments.of) == MATRICES
    assert_close(moments.of["delta"].rows, policy.float() - base.float(), rtol=0, atol=0)
    assert_close(moments.of["policy"].mean() - moments.of["base"].mean(), moments.of["delta"].mean())
    twice = UpdateMoments(6, matrices=("delta",))
    twice.merge(moments)
    twice.merge(moments)
    assert twice.of["delta"].n_rows == 40
    alone = moments.all_reduce(lambda x: x, rank=0, world_size=1)
    assert_same(alone.of["delta"].geometry(), moments.of["delta"].geometry(), 1e-9)


def test_moments_without_rows_or_of_another_width_are_refused() -> None:
    moments = RowMoments(4, max_rows_kept=2)
    with pytest.raises(ValueError, match="expected at least one row"):
        moments.geometry()
    with pytest.raises(ValueError, match="expected rows of width 4, got 3"):
        moments.update(noise(2, 3))
    moments.update(noise(5, 4))
    with pytest.raises(ValueError, match="unit_rows=True"):
        moments.geometry("unit_row")
    with pytest.raises(ValueError, match="beyond max_rows_kept=2 were folded"):
        _ = moments.rows


@pytest.mark.parametrize("kept", [KEPT, FOLDED])
def test_scatter_is_that_of_the_rows_whatever_their_mean_and_leaves_everything_as_it_is(kept: int) -> None:
    rows = noise(300, 6) + 1e6
    moments = moments_of(rows, kept, pieces=4)
    assert_close(moments.scatter(), 299 * rows.T.cov(), rtol=1e-8, atol=1e-6)
    moments.scatter().zero_()
    assert moments.keeps_rows == (kept == KEPT)
    assert_close(moments.scatter(), 299 * rows.T.cov(), rtol=1e-8, atol=1e-6)
