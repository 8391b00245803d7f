"""Gradient fields: closed forms against finite differences and automatic differentiation, the tautology, and exact minima."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from tests.tiny_models import make_model
from tiltmeter.geometry.gradient_field import (
    Context,
    field_grid,
    field_summary,
    layer_field,
    post_norm_field,
    smallest_pairwise_cosine,
)
from tiltmeter.models.hooks import hook_site
from tiltmeter.models.layers import all_sites

D, BETA, GAP = 6, 0.7, 0.4


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


V, GAIN = noise(D, seed=1), noise(D, seed=2)
STATES = noise(100, D, seed=3) * torch.tensor([1.0, 5, 0.3, 2, 1, 1]) + 4
GRID = field_grid(STATES[0], V, STATES, n=3)


def finite_differences(margin: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Fourth-order central differences of −log σ(β m), one entry at a time."""
    step, gradient = 1e-3, torch.empty_like(points)

    def loss(x: Tensor) -> Tensor:
        return -F.logsigmoid(BETA * margin(x))

    for i in range(D):
        e = step * torch.eye(D, dtype=torch.float64)[i]
        near, far = loss(points + e) - loss(points - e), loss(points + 2 * e) - loss(points - 2 * e)
        gradient[:, i] = (8 * near - far) / (12 * step)
    return gradient


def test_the_grid_is_in_standard_deviations_on_v_and_what_is_orthogonal_to_it() -> None:
    grid = field_grid(STATES[0], 3 * V, STATES, n=5, step=0.5)
    assert grid.points.shape == (125, D)
    assert torch.equal(grid.points[62], STATES[0])
    assert_close(grid.axes @ grid.axes.T, torch.eye(3, dtype=torch.float64))
    assert_close(grid.axes[0], V / V.norm())
    assert_close(grid.spreads, (STATES @ grid.axes.T).std(0))
    assert_close((grid.points - STATES[0]) @ grid.axes.T / grid.spreads, grid.coordinates)
    assert grid.coordinates.unique().tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    orthogonal = torch.linalg.svd(V[None]).Vh[1:]  # a basis of what is orthogonal to v
    variances = torch.linalg.eigvalsh((STATES @ orthogonal.T).T.cov()).flip(0)
    assert_close(grid.spreads[1:].square(), variances[:2])


def test_states_that_cannot_give_three_axes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\|v\|=0"):
        field_grid(STATES[0], 0 * V, STATES)
    with pytest.raises(ValueError, match=r"states of shape \(2, 6\)"):
        field_grid(STATES[0], V, STATES[:2])
    with pytest.raises(ValueError, match="do not vary in two directions orthogonal to v"):
        field_grid(STATES[0], V, torch.outer(STATES[:, 0], V) + noise(1, D))
    with pytest.raises(ValueError, match="step=0"):
        field_grid(STATES[0], V, STATES, step=0.0)


def test_post_norm_field_is_the_gradient_and_marked_a_tautology() -> None:
    found = post_norm_field(GRID.points, V, reference_gap=GAP, beta=BETA)
    numeric = finite_differences(lambda x: x @ V - GAP, GRID.points)
    assert_close(found.gradients, numeric, rtol=0, atol=1e-10)
    assert found.is_tautology
    assert found.summary[:3] == pytest.approx((27, 1, 1), abs=1e-12)


@example(seed=285, beta=5.28125, gap=4.25, size=26.4375)  # a loss so small that squares of its gradient underflow
@example(seed=269, beta=8.0, gap=0.0, size=10.0)
@given(st.integers(0, 999), st.floats(0.01, 10), st.floats(-5, 5), st.floats(0.1, 30))
def test_post_norm_resultant_is_one_for_any_states(seed: int, beta: float, gap: float, size: float) -> None:
    found = post_norm_field(size * noise(9, D, seed=seed), noise(D, seed=seed + 1), reference_gap=gap, beta=beta)
    assert found.summary.mean_resultant == pytest.approx(1, abs=1e-9)
    assert found.summary.smallest_cosine == pytest.approx(1, abs=1e-9)


def test_layer_field_is_the_gradient_of_any_function() -> None:
    inner, outer = noise(D, 8, seed=4), noise(8, seed=5)
    points = noise(600, D, seed=6)  # more than are done at a time

    def margin(x: Tensor) -> Tensor:
        return torch.tanh(x @ inner / 3) @ outer - GAP

    found = layer_field(points, margin, beta=BETA)
    assert_close(found.gradients, finite_differences(margin, points), rtol=0, atol=1e-10)
    assert (found.variant, found.is_tautology, found.summary.n_points) == ("layer", False, 600)
    with torch.no_grad():
        assert torch.equal(layer_field(points, margin, beta=BETA).gradients, found.gradients)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi", "gemma3_text"])
def test_a_context_gives_the_models_own_margin_and_gradient_at_every_site(family: str) -> None:
    """At the states that the model itself has there, against one pass and one backward pass through the whole model."""
    model = make_model(family, attn="eager" if family == "gemma2" else "sdpa", num_hidden_layers=3).eval()
    ids, (w, y_l), sites = [4, 9, 33, 7], (5, 11), all_sites(3)
    held: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for site in sites:
            receive = partial(lambda hidden, site: held.update({site: hidden}), site=site)
            stack.callback(hook_site(model, site, receive).remove)
        logits = model(torch.tensor([ids])).logits[0, -1]
    margin = logits[w] - logits[y_l] - GAP
    expected = torch.autograd.grad(-F.logsigmoid(BETA * margin), [held[site] for site in sites])
    before = model.config._attn_implementation
    context = Context(model, ids)
    for site, gradient in zip(sites, expected, strict=True):
        own = held[site][0, -1].detach()
        found = context.margin(site, chosen_id=w, rejected_id=y_l, reference_gap=GAP)
        points = torch.stack([own + 1, own, own - 1])
        assert_close(found(points)[1], margin, rtol=0, atol=1e-5)
        assert_close(layer_field(points, found, beta=BETA).gradients[1].float(), gradient[0, -1], rtol=1e-3, atol=1e-5)
        alone = [found(point[None])[0] for point in points]
        assert_close(found(points), torch.stack(alone), rtol=0, atol=1e-5)
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_context_needs_a_token_before_its_last() -> None:
    with pytest.raises(ValueError, match="at least two tokens, got 1"):
        Context(make_model("llama"), [4])


def brute_force(rows: Tensor) -> float:
    return min(
        float(F.cosine_similarity(rows[i], rows[j], dim=0)) for i in range(len(rows)) for j in range(i) if i != j
    )


@given(st.integers(2, 20), st.integers(1, 5), st.integers(0, 99))
def test_the_smallest_cosine_is_that_of_all_pairs(n: int, d: int, seed: int) -> None:
    rows = noise(n, d, seed=seed)
    assert smallest_pairwise_cosine(rows) == (pytest.approx(brute_force(rows), abs=1e-9), True)


@pytest.mark.parametrize("kind", ["noise", "cone", "one off"])
def test_extreme_points_find_the_smallest_cosine_of_many_rows(kind: str) -> None:
    for seed in range(5):
        rows = noise(1500, 12, seed=seed)
        if kind != "noise":
            rows = rows * torch.linspace(0.1, 1, 12) + 6 * torch.eye(12)[0]
        if kind == "one off":
            rows[777] *= -1
        exact, _ = smallest_pairwise_cosine(rows)
        bound, is_exact = smallest_pairwise_cosine(rows, exact_up_to=1000)
        assert not is_exact
        assert exact - 1e-12 <= bound <= exact + 0.03


def test_gradients_without_direction_count_nowhere_and_bad_ones_are_seen() -> None:
    assert field_summary(torch.zeros(3, 4)).n_points == 0
    assert math.isnan(field_summary(torch.zeros(3, 4)).mean_resultant)
    assert math.isnan(field_summary(torch.ones(1, 4)).smallest_cosine)
    tiny = torch.tensor([[3e-200, 4e-200], [0.0, 1.0], [1e-320, 0.0]], dtype=torch.float64)
    assert field_summary(tiny)[::2] == pytest.approx((2, 0.8))
    rows = noise(50, 4)
    rows[7, 2] = math.nan
    for limit in (100, 10):
        assert math.isnan(smallest_pairwise_cosine(rows, exact_up_to=limit)[0])
    assert math.isnan(field_summary(rows).mean_resultant)
    assert math.isnan(post_norm_field(rows, rows[0], reference_gap=0.0, beta=1.0).summary.mean_resultant)
