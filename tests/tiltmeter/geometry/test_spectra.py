import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.geometry.spectra import (
    Spectrum,
    effective_rank,
    eigen_of_gram,
    entropies_of_gram,
    normalized_entropy,
    participation_ratio,
    sigma_ratio,
    singular_values,
    singular_values_of_gram,
    smaller_gram,
    spectral_entropy,
    spectrum,
    stable_rank,
    top1_energy,
)
from tiltmeter.stats.jackknife import jackknife_variance, without_each

NAN = math.nan
sizes = st.integers(1, 12)
positive = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12)


def matrix(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(k: int, seed: int) -> Tensor:
    return torch.linalg.qr(matrix(k, k, seed)).Q


def figures(sigma: list[float]) -> Spectrum:
    return spectrum(torch.tensor(sigma, dtype=torch.float64), n_rows=len(sigma), d_model=len(sigma))


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [
        ([1], Spectrum(1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0)),
        ([5, 0, 0], Spectrum(3, 3, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0)),
        ([1, 1, 1, 1], Spectrum(4, 4, 1.386294, 1.386294, 1, 1, 4, 4, 4, 4, 0.25, 1)),
        ([2, 1], Spectrum(2, 2, 0.500402, 0.636514, 0.721928, 0.918296, 1.649385, 1.889882, 1.470588, 1.25, 0.8, 0.5)),
        (
            [4, 2, 1],
            Spectrum(3, 3, 0.668018, 0.955700, 0.608056, 0.869916, 1.950368, 2.600490, 1.615385, 1.3125, 0.761905, 0.5),
        ),
    ],
)
def test_spectral_figures_have_their_closed_form_values(sigma: list[float], expected: Spectrum) -> None:
    assert figures(sigma) == pytest.approx(expected, abs=1e-6)


@given(positive, st.floats(1e-100, 1e100))
def test_figures_do_not_depend_on_scale_or_order(sigma: list[float], scale: float) -> None:
    expected = pytest.approx(figures(sigma), rel=1e-9, abs=1e-9)
    assert figures([scale * x for x in sigma]) == expected
    assert figures(sigma[::-1]) == expected


@given(positive)
def test_bounds_and_order_of_the_ranks(sigma: list[float]) -> None:
    s = figures(sigma)
    k, slack = len(sigma), 1 + 1e-9
    assert -1e-12 <= s.entropy_energy <= s.entropy_singular * slack + 1e-12
    assert s.entropy_singular <= math.log(k) + 1e-9
    assert 0 <= s.normalized_entropy_energy <= slack
    assert 1 <= s.stable_rank <= s.participation_ratio * slack
    assert s.participation_ratio <= s.effective_rank_energy * slack, "Rényi entropies fall with their order"
    assert s.effective_rank_energy <= s.effective_rank_singular * slack
    assert s.effective_rank_singular <= k * slack
    assert s.top1_energy == pytest.approx(1 / s.stable_rank)


@settings(deadline=None)
@given(sizes, sizes, st.integers(0, 99), st.floats(0.01, 100))
def test_singular_values_are_those_of_lapack_and_invariant(n: int, d: int, seed: int, c: float) -> None:
    rows = matrix(n, d, seed)
    sigma = singular_values(rows)
    tolerance = {"rtol": 1e-7, "atol": 1e-7}
    assert_close(sigma, torch.linalg.svdvals(rows), **tolerance)
    assert_close(singular_values(rows.T), sigma, **tolerance)
    assert_close(singular_values(rows[torch.randperm(n, generator=torch.manual_seed(seed))]), sigma, **tolerance)
    turned = c * orthogonal(n, seed + 1) @ rows @ orthogonal(d, seed + 2)
    assert_close(singular_values(turned) / c, sigma, **tolerance)


@settings(deadline=None)
@given(sizes, sizes, st.integers(0, 99))
def test_dual_and_primal_gram_give_the_same(n: int, d: int, seed: int) -> None:
    rows = matrix(n, d, seed)
    k = min(n, d)
    dual, primal = singular_values_of_gram(rows @ rows.T)[:k], singular_values_of_gram(rows.T @ rows)[:k]
    assert_close(dual, primal, rtol=1e-7, atol=1e-7)
    assert smaller_gram(rows).shape == (k, k)


def test_rounding_of_a_gram_matrix_does_not_count_as_directions() -> None:
    rows = torch.outer(matrix(300, 1)[:, 0], matrix(200, 1, 1)[:, 0])
    sigma = singular_values(rows)
    assert int((sigma > 0).sum()) == 1
    s = spectrum(sigma, n_rows=300, d_model=200)
    assert s.entropy_singular == s.entropy_energy == s.sigma_ratio == 0


def test_the_top_eigenvector_belongs_to_the_largest_singular_value() -> None:
    rows = matrix(5, 8)
    gram = smaller_gram(rows)
    sigma, top = eigen_of_gram(gram)
    assert_close(gram @ top, sigma[0] ** 2 * top)
    assert_close(sigma, singular_values(rows))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 4), (4, 1)])
def test_spectrum_of_a_matrix_of_zeros_is_nan(shape: tuple[int, int]) -> None:
    sigma = singular_values(torch.zeros(shape))
    assert sigma.tolist() == [0.0] * min(shape)
    s = spectrum(sigma, n_rows=shape[0], d_model=shape[1])
    assert all(math.isnan(x) for x in s[2:])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_give_nan_and_no_crash(bad: float) -> None:
    rows = matrix(4, 6)
    rows[2, 3] = bad
    sigma = singular_values(rows)
    assert sigma.isnan().all()
    assert eigen_of_gram(smaller_gram(rows))[1].isnan().all()
    assert all(math.isnan(x) for x in spectrum(sigma, n_rows=4, d_model=6)[2:])


def test_single_functions_equal_the_fields_of_spectrum() -> None:
    sigma = torch.tensor([4.0, 2.0, 1.0])
    s = figures([4, 2, 1])
    assert spectral_entropy(sigma, "energy") == pytest.approx(s.entropy_energy)
    assert normalized_entropy(sigma, "singular") == pytest.approx(s.normalized_entropy_singular)
    assert effective_rank(sigma, "singular") == pytest.approx(s.effective_rank_singular)
    assert participation_ratio(sigma) == pytest.approx(s.participation_ratio)
    assert (stable_rank(sigma), top1_energy(sigma), sigma_ratio(sigma)) == pytest.approx(
        (s.stable_rank, s.top1_energy, s.sigma_ratio)
    )
    with pytest.raises(ValueError, match=r"expected min\(3, 2\) singular values, got 3"):
        spectrum(sigma, n_rows=3, d_model=2)


@pytest.mark.parametrize("kind", ["noise", "shifted", "centred", "rank one", "tiny", "two equal"])
def test_the_top_direction_of_a_large_gram_matrix_is_that_of_a_whole_decomposition(kind: str) -> None:
    x = matrix(560, 700)
    if kind == "shifted":
        x = x + 3
    elif kind == "centred":
        x = x - x.mean(0)
    elif kind == "rank one":
        x = torch.outer(x[:, 0], x[0])
    elif kind == "tiny":
        x = x * 1e-120
    elif kind == "two equal":
        x = orthogonal(560, 1)
        x[:, :2] *= 5
    gram = x @ x.T
    sigma, top = eigen_of_gram(gram)
    values, vectors = torch.linalg.eigh(gram)
    assert_close(sigma, singular_values_of_gram(gram), rtol=1e-9, atol=0)
    assert float(top.norm()) == pytest.approx(1)
    assert float(top @ gram @ top) == pytest.approx(float(values[-1]), rel=1e-9)
    if kind != "two equal":
        assert float((top @ vectors[:, -1]).abs()) == pytest.approx(1, abs=1e-7)


def test_a_large_gram_matrix_without_directions_has_none() -> None:
    sigma, _ = eigen_of_gram(torch.zeros(520, 520, dtype=torch.float64))
    assert not sigma.any()
    assert eigen_of_gram(torch.full((520, 520), NAN, dtype=torch.float64))[0].isnan().all()


def test_entropies_without_a_row_are_to_first_order_those_of_the_other_rows() -> None:
    rows = torch.randn(60, 24, generator=torch.Generator().manual_seed(0)).double() * torch.logspace(0, -1, 24).double()
    weights = without_each([str(i) for i in range(60)])
    found = entropies_of_gram(rows @ rows.T)(weights)
    exact = [singular_values(rows[row > 0]) for row in weights]
    for column, kind in enumerate(("energy", "singular")):
        expected = torch.tensor([spectral_entropy(sigma, kind) for sigma in exact], dtype=torch.float64)
        torch.testing.assert_close(found[0, column], expected[0], rtol=1e-12, atol=1e-12)
        ratio = jackknife_variance(found[1:, column]) / jackknife_variance(expected[1:])
        assert 0.9 < float(ratio) < 1.6, "on the safe side where directions lie close"
