"""Traces by hand: the logit lens against a model's own last map, constant shares of planted rows, differences of states."""

import math

import pytest
import torch

from tests.tiny_models import make_model
from tiltmeter.geometry.traces import constant_share, difference_directions, logit_lens
from tiltmeter.models.layers import Unembedding, final_norm, unembedding


def test_lens_behind_the_final_norm_is_what_the_direction_adds_to_logits() -> None:
    model = make_model("llama", torch.float64)
    hidden, direction = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        added = model.lm_head(hidden + direction) - model.lm_head(hidden)
    found = logit_lens(direction, unembedding(model), norm=None, n_tokens=3)
    assert found.logits.tolist() == pytest.approx(added.tolist(), abs=1e-9)
    assert found.up.tolist() == added.argsort(descending=True)[:3].tolist()
    assert found.down.tolist() == added.argsort()[:3].tolist()


def test_lens_in_front_of_the_final_norm_puts_the_direction_through_it() -> None:
    model = make_model("llama", torch.float64)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = model.lm_head(final_norm(model)(direction[None]))[0]
    found = logit_lens(direction, unembedding(model), norm=final_norm(model), n_tokens=2)
    assert found.logits.tolist() == pytest.approx(expected.tolist(), abs=1e-9)


def test_lens_scales_as_the_models_logits_do() -> None:
    assert logit_lens(torch.ones(2), Unembedding(torch.eye(2), scale=0.5), norm=None, n_tokens=1).logits.tolist() == [
        0.5,
        0.5,
    ]


def test_constant_share_is_1_of_a_shift_and_that_of_a_shift_with_orthogonal_rest() -> None:
    groups = [str(i // 2) for i in range(8)]
    assert constant_share(torch.ones(8, 5), groups).value == pytest.approx(1)
    c, n = 2.0, 8
    rows = torch.eye(n + 1, dtype=torch.float64)[1:]
    rows[:, 0] = c  # δ_i = v + w_i, ‖v‖ = c: f = (c² + 1/N)/(c² + 1)
    found = constant_share(rows, groups)
    assert found.value == pytest.approx((c**2 + 1 / n) / (c**2 + 1))
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_models_that_are_the_same_have_no_constant_share() -> None:
    assert all(map(math.isnan, constant_share(torch.zeros(4, 3), list("abcd"))))


def test_differences_are_of_states_of_two_texts() -> None:
    states = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = ["a", "a", "b", "b", "c", "c"]
    possible = [states[i] - states[j] for i in range(6) for j in range(6) if groups[i] != groups[j]]
    for found in difference_directions(states, groups, 20, seed=3):
        assert any(torch.allclose(found, one) for one in possible)
    first = difference_directions(states, groups, 5, seed=3)
    assert torch.equal(first, difference_directions(states, groups, 20, seed=3)[:5]), (
        "further draws leave the first as they are"
    )


@pytest.mark.parametrize(("states", "groups"), [(torch.randn(3, 2), ["a"] * 3), (torch.ones(3, 2), ["a", "b", "c"])])
def test_states_without_a_difference_are_refused(states: torch.Tensor, groups: list[str]) -> None:
    with pytest.raises(ValueError, match="at least two texts that differ"):
        difference_directions(states, groups, 2, seed=0)
