"""Controls of METHOD C15: norms, distributions, seeds, and what they say of themselves."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, kstest
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.geometry.consistency import cosine
from tiltmeter.geometry.directions import principal_directions
from tiltmeter.steering.controls import (
    Control,
    covariance_matched,
    draw_seeds,
    norm_matched,
    random_in_span,
    random_vectors,
    shuffled_layers,
    unrelated_contrasts,
)

D = 16
Draw = Callable[[Tensor, int, int], Control]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROWS = noise(200, D) * torch.linspace(0.1, 5, D) @ torch.linalg.qr(noise(D, D, seed=1)).Q + 7
SPAN = principal_directions(ROWS, 4, centred=True).directions


def seeds(n: int, seed: int = 0) -> list[int]:
    return draw_seeds(n, kind="any", site="layer_00", seed=seed)


KINDS: dict[str, Draw] = {
    "uniform": lambda like, n, seed: random_vectors(like, seeds(n, seed)),
    "span": lambda like, n, seed: random_in_span(like, SPAN, seeds(n, seed)),
    "rows": lambda like, n, seed: covariance_matched(like, ROWS, seeds(n, seed)),
    "halves": lambda like, n, seed: unrelated_contrasts(like, ROWS, seeds(n, seed)),
}


def test_no_two_draws_kinds_or_sites_share_a_seed_and_more_draws_keep_the_first() -> None:
    found = [
        seed
        for kind in ("random", "random_pca", "unrelated_contrast")
        for site in ("layer_00", "layer_01", "final_post_norm")
        for start in (0, 1)
        for seed in draw_seeds(99, kind=kind, site=site, seed=start)
    ]
    assert len(set(found)) == len(found) == 3 * 3 * 2 * 99
    few, many = (random_vectors(noise(D), seeds(n)).vectors for n in (5, 99))
    assert torch.equal(many[:5], few)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(st.floats(1e-6, 1e6), st.integers(0, 99))
def test_norms_are_those_of_the_vector_and_seeds_tell_draws_apart(kind: str, size: float, seed: int) -> None:
    like = size * noise(D, seed=3)
    found = KINDS[kind](like.float(), 20, seed)
    assert found.vectors.shape == (20, D)
    assert_close(found.vectors.norm(dim=1), like.float().double().norm().expand(20), rtol=1e-12, atol=0)
    assert torch.equal(found.vectors, KINDS[kind](like.float(), 20, seed).vectors)
    assert not torch.equal(found.vectors, KINDS[kind](like.float(), 20, seed + 1).vectors)
    assert f"at norm {float(like.float().double().norm()):.6g}" in found.made


def test_uniform_directions_have_squared_coordinates_of_a_beta_distribution() -> None:
    unit = random_vectors(noise(D), seeds(4000)).vectors / noise(D).norm()
    for coordinate in (0, 7):
        assert kstest(unit[:, coordinate].square().numpy(), beta(0.5, (D - 1) / 2).cdf).pvalue > 0.001
    assert float(unit.mean(0).norm()) < 4 / math.sqrt(4000)


def test_directions_in_a_span_stay_in_it_and_are_uniform_there() -> None:
    unit = random_in_span(noise(D), SPAN, seeds(4000)).vectors / noise(D).norm()
    inside = unit @ SPAN.T
    assert_close(inside.norm(dim=1), torch.ones(4000, dtype=torch.float64))
    for coordinate in range(4):
        assert kstest(inside[:, coordinate].square().numpy(), beta(0.5, 1.5).cdf).pvalue > 0.001


def test_a_span_does_not_depend_on_its_basis() -> None:
    skew = torch.tensor([[1.0, 0, 0, 0], [3, 0.1, 0, 0], [0, 5, 2, 0], [1, 1, 1, 90]], dtype=torch.float64) @ SPAN
    unit = random_in_span(noise(D), skew, seeds(4000)).vectors / noise(D).norm()
    inside = unit @ SPAN.T
    assert_close(inside.T @ inside / 4000, torch.eye(4, dtype=torch.float64) / 4, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["rows", "halves"])
def test_covariance_matched_directions_vary_as_the_rows_do(kind: str) -> None:
    """Directions of x ~ N(0, Σ): drawn here from a Cholesky factor, a second way."""
    covariance = ROWS.T.cov()
    drawn = noise(20000, D, seed=5) @ torch.linalg.cholesky(covariance).T
    expected = (drawn / drawn.norm(dim=1, keepdim=True)).T.cov()
    unit = KINDS[kind](noise(D), 20000, 0).vectors / noise(D).norm()
    assert_close(unit.T @ unit / 20000, expected, rtol=0, atol=0.01)
    assert float(unit.mean(0).norm()) < 0.03, "the rows' large mean is no part of it"
    top = principal_directions(ROWS, 1, centred=True).directions[0]
    assert float((unit @ top).square().mean()) > 2 / D


def test_shuffled_layers_are_a_cycle_with_each_sites_own_norm() -> None:
    vectors = {f"layer_{i:02d}": (i + 1) * noise(D, seed=i) for i in range(5)}
    for seed in range(20):
        found = shuffled_layers(vectors, seed=seed)
        givers = []
        for site, control in found.items():
            assert float(control.vectors.norm()) == pytest.approx(float(vectors[site].norm()), rel=1e-12)
            (giver,) = [name for name, v in vectors.items() if float(cosine(v, control.vectors[0])) > 1 - 1e-9]
            assert giver != site
            assert control.how == f"v* of {giver}"
            givers.append(giver)
        assert sorted(givers) == sorted(vectors)
    assert len({shuffled_layers(vectors, seed=seed)["layer_00"].how for seed in range(20)}) == 4


def test_what_has_no_norm_or_no_direction_is_refused() -> None:
    zero = torch.zeros(D)
    for draw in KINDS.values():
        with pytest.raises(ValueError, match="like of a finite norm above 0, got"):
            draw(zero, 3, 0)
    with pytest.raises(ValueError, match="SFT's v\\*: expected vectors of a finite norm"):
        norm_matched(torch.stack([noise(D), torch.full((D,), torch.nan)]), noise(D), how="SFT's v*")
    with pytest.raises(ValueError, match="vectors of a finite norm above 0"):
        covariance_matched(noise(D), torch.ones(5, D), seeds(3))
    with pytest.raises(ValueError, match="at least two rows, got 1"):
        covariance_matched(noise(D), noise(1, D), seeds(3))
    with pytest.raises(ValueError, match="linearly independent"):
        random_in_span(noise(D), torch.stack([SPAN[0], SPAN[1], SPAN[0] + SPAN[1]]), seeds(3))
    with pytest.raises(ValueError, match="at least two sites"):
        shuffled_layers({"layer_00": noise(D)})
