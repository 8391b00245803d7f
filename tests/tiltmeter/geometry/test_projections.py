import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.tiny_models import ARCHITECTURES, make_model, random_pairs
from tiltmeter.geometry.directions import token_preference_vectors
from tiltmeter.geometry.projections import (
    hyperplane_distances,
    inner_products,
    logit_gaps,
    projection_change,
    projections,
    share_preferred,
    summarize_projections,
)
from tiltmeter.models.layers import FINAL_POST_NORM, Unembedding, unembedding
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.states.capture import ReadPoint, read_hidden_states
from tiltmeter.states.positions import divergence


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.floats(1e-3, 1e3), st.integers(0, 99))
def test_a_projection_does_not_depend_on_the_length_of_v(scale: float, seed: int) -> None:
    h, v = noise(4, 6, seed), noise(4, 6, seed + 1)
    assert_close(projections(h, scale * v), projections(h, v))
    assert_close(inner_products(h, scale * v), scale * inner_products(h, v))
    assert_close(projections(3 * v, v), 3 * v.norm(dim=1))
    assert_close(projections(h, v[:1]), projections(h, v[:1].expand(4, -1)))


def test_the_change_is_that_of_the_update_and_survives_large_states() -> None:
    base, v = noise(50, 8) + 1e4, noise(50, 8, 1)
    update = 1e-3 * noise(50, 8, 2)
    found = projection_change(base, base + update, v)
    assert_close(found.change, projections(update, v), rtol=1e-5, atol=1e-9)
    assert_close(found.policy - found.base, found.change, rtol=1e-3, atol=1e-9)


def test_summary_means_share_and_intervals() -> None:
    v = torch.tensor([[0.0, 2.0]])
    base = torch.tensor([[9.0, 0.0], [9.0, 1.0], [9.0, 2.0], [9.0, 3.0]])
    policy = base + torch.tensor([[0.0, 1.0], [5.0, -1.0], [0.0, 3.0], [0.0, 1.0]])
    found = summarize_projections(projection_change(base, policy, v), ["a", "b", "c", "c"])
    assert (found.base, found.policy, found.change.value) == (1.5, 2.5, 1.0)
    assert found.share_grown.value == 0.75
    for interval in (found.change, found.share_grown):
        assert interval.low <= interval.value <= interval.high
    everyone = summarize_projections(projection_change(base, base + 1, v), ["a", "b", "c", "d"])
    assert everyone.change == (1, 1, 1)
    assert everyone.share_grown == pytest.approx((1, 0.025 ** (1 / 4), 1)), "four pairs that all grew are no certainty"


def test_pairs_without_a_direction_are_left_out() -> None:
    v = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    found = projection_change(torch.zeros(2, 2), torch.ones(2, 2), v)
    assert math.isnan(float(found.change[1]))
    summary = summarize_projections(found, ["a", "b"])
    assert summary.share_grown.value == summary.change.value == 1
    with pytest.raises(ValueError, match="expected 2 cluster names, got 1"):
        summarize_projections(found, ["a"])


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_logit_gaps_are_differences_of_log_probs(family: str) -> None:
    model = make_model(family, attn="eager")
    batch = collate_pairs(random_pairs(5), pair_index=range(5), layout="concatenated")
    at = divergence(batch)
    states = read_hidden_states(model, batch, sites=FINAL_POST_NORM, positions=["diverge"])
    hidden = states[ReadPoint(FINAL_POST_NORM, "diverge")].rows
    with torch.no_grad():
        mask = (batch.segments != 0).long()
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask).logits
    table = logits.flatten(0, 1).log_softmax(-1)[at.rows]
    expected = table.gather(1, at.chosen_ids[:, None]) - table.gather(1, at.rejected_ids[:, None])
    gaps = logit_gaps(hidden, unembedding(model), at.chosen_ids, at.rejected_ids)
    assert_close(gaps, expected[:, 0].double(), rtol=1e-4, atol=1e-4)


def test_the_base_lies_on_its_own_hyperplane_and_moving_along_v_leaves_it() -> None:
    head = Unembedding(noise(20, 6))
    w, y_l = torch.tensor([3, 4, 5]), torch.tensor([9, 1, 2])
    h = noise(3, 6, 1)
    v = token_preference_vectors(head, w, y_l)
    gaps = logit_gaps(h, head, w, y_l)
    assert_close(hyperplane_distances(h, v, gaps), torch.zeros(3, dtype=torch.float64))
    moved = h + 0.7 * torch.tensor([[1.0], [-1.0], [1.0]]) * v / v.norm(dim=1, keepdim=True)
    distances = hyperplane_distances(moved, v, gaps)
    assert_close(distances, torch.tensor([0.7, -0.7, 0.7], dtype=torch.float64))
    assert share_preferred(distances) == pytest.approx(2 / 3)
    assert math.isnan(share_preferred(torch.tensor([torch.nan])))
