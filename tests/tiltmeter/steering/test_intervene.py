import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.tiltmeter.steered import SITES, ids_of, model_of, n_hooks, noise, run
from tests.tiny_models import WIDTH, make_model
from tiltmeter.errors import UserError
from tiltmeter.models.layers import backbone, final_norm, unembedding
from tiltmeter.steering.intervene import Intervention, steer
from tiltmeter.steering.operators import OPERATORS, Operator

GOLDEN_FAMILIES = ("llama", "gpt2", "gemma2", "cohere")


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", GOLDEN_FAMILIES)
def test_adding_shifts_the_site_by_exactly_that_and_nothing_below_it(family: str, site: str) -> None:
    model, ids, v = model_of(family), ids_of(), noise(1, WIDTH)
    before, logits = run(model, ids)
    with steer(model, Intervention(site, v, 0.7)):
        after, steered_logits = run(model, ids)
    depth = SITES.index(site)
    for below in SITES[:depth]:
        assert torch.equal(after[below], before[below])
    assert torch.equal(after[site], before[site] + 0.7 * v)
    for above in SITES[depth + 1 :]:
        assert not torch.equal(after[above], before[above])
    assert not torch.equal(logits, steered_logits)
    _, logits_again = run(model, ids)
    assert torch.equal(logits_again, logits)
    assert n_hooks(model) == 0


@pytest.mark.parametrize("family", GOLDEN_FAMILIES)
def test_adding_and_then_subtracting_is_the_identity(family: str) -> None:
    model, ids, v = model_of(family), ids_of(), noise(1, WIDTH)
    before, logits = run(model, ids)
    for site in SITES:
        for undo in (Intervention(site, v, -0.7), Intervention(site, v, 0.7, "subtract")):
            with steer(model, [Intervention(site, v, 0.7), undo]):
                after, steered_logits = run(model, ids)
            assert_close(after[site], before[site], rtol=0, atol=1e-14)
            assert_close(steered_logits, logits, rtol=0, atol=1e-4)  # some families normalise in float32


@pytest.mark.parametrize("family", GOLDEN_FAMILIES)
def test_adding_after_the_final_norm_adds_a_constant_to_the_logits(family: str) -> None:
    model, ids, v = model_of(family), ids_of(), noise(1, WIDTH)
    head = unembedding(model)
    _, logits = run(model, ids)
    with steer(model, Intervention("final_post_norm", v, 0.3)):
        _, steered = run(model, ids)

    def before_the_cap(z: Tensor) -> Tensor:
        return (z if head.soft_cap is None else torch.atanh(z / head.soft_cap) * head.soft_cap) / head.scale

    bias = (0.3 * head.weight.detach() @ v[0]).expand_as(logits)
    assert_close(before_the_cap(steered) - before_the_cap(logits), bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", GOLDEN_FAMILIES)
def test_its_own_difference_turns_the_base_into_the_policy_and_back(family: str) -> None:
    base, policy, ids = model_of(family), model_of(family, seed=1), ids_of(4, 5)
    with torch.no_grad():  # the paper's setting: one unembedding
        policy.get_output_embeddings().weight.copy_(base.get_output_embeddings().weight)
    (h_base, z_base), (h_policy, z_policy) = run(base, ids), run(policy, ids)
    deltas = (h_policy["final_post_norm"] - h_base["final_post_norm"])[:, -1]
    each_its_own = torch.eye(4, dtype=torch.float64)
    with steer(base, Intervention("final_post_norm", deltas, each_its_own)):
        _, steered = run(base, ids)
    with steer(policy, Intervention("final_post_norm", deltas, each_its_own, "subtract")):
        _, inverted = run(policy, ids)
    assert (z_base[:, -1] - z_policy[:, -1]).abs().max() > 0.1
    assert_close(steered[:, -1], z_policy[:, -1], rtol=0, atol=1e-12)
    assert_close(inverted[:, -1], z_base[:, -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", GOLDEN_FAMILIES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_rows_with_their_own_coefficients_are_separate_runs(family: str, operator: Operator) -> None:
    model, ids, v = model_of(family), ids_of(1, 6), noise(2, WIDTH)
    lambdas = [-1.0, 0.0, 0.5, 2.0]
    with steer(model, Intervention("layer_00", v, torch.tensor(lambdas, dtype=torch.float64), operator)):
        _, together = run(model, ids.expand(4, -1))
    for row, value in enumerate(lambdas):
        with steer(model, Intervention("layer_00", v, value, operator)):
            _, alone = run(model, ids)
        assert_close(together[row], alone[0], rtol=0, atol=1e-5 if family != "gpt2" else 1e-12)


@pytest.mark.parametrize("site", SITES)
def test_projected_out_directions_are_gone_at_the_site(site: str) -> None:
    model, ids, v = model_of("gpt2"), ids_of(), noise(2, WIDTH)
    with steer(model, Intervention(site, v, 1.0, "project_out")):
        after, _ = run(model, ids)
    assert (after[site] @ v.T).abs().max() < 1e-12
    with steer(model, [Intervention(site, v, 1.0, "project_out")] * 2):
        twice, _ = run(model, ids)
    assert_close(twice[site], after[site], rtol=0, atol=1e-12)


def test_several_layers_and_vectors_act_at_once() -> None:
    model, ids = model_of("gpt2"), ids_of()
    two, one = noise(2, WIDTH), noise(1, WIDTH, seed=1)
    strengths = noise(3, 2, seed=2)
    before, _ = run(model, ids)
    with steer(model, [Intervention("layer_00", two, strengths), Intervention("final_post_norm", one, -1)]):
        after, _ = run(model, ids)
    assert_close(after["layer_00"], before["layer_00"] + (strengths @ two)[:, None], rtol=0, atol=1e-14)
    with torch.no_grad():
        assert_close(after["final_post_norm"], final_norm(model)(after["final_pre_norm"]) - one, rtol=0, atol=1e-14)


def test_coefficients_of_every_token_are_taken_by_token() -> None:
    model, ids, v = model_of("gpt2"), ids_of(2, 5), noise(2, WIDTH)
    by_token = noise(2, 5, 2, seed=3)
    before, _ = run(model, ids)
    with steer(model, Intervention("layer_00", v, by_token)):
        after, _ = run(model, ids)
    assert_close(after["layer_00"], before["layer_00"] + by_token @ v, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("operator", [operator for operator in OPERATORS if operator != "clamp"])
def test_rows_of_coefficient_zero_keep_every_bit_and_the_stream_its_dtype(
    operator: Operator, dtype: torch.dtype
) -> None:
    model, ids, v = make_model("gpt2", dtype), ids_of(4), noise(2, WIDTH)
    before, logits = run(model, ids)
    for site in SITES:
        with steer(model, Intervention(site, v, torch.tensor([0.0, 1.0, -0.0, 2.0]), operator)):
            after, steered = run(model, ids)
        assert after[site].dtype == dtype
        for row in (0, 2):
            assert torch.equal(steered[row], logits[row])
        assert not torch.equal(after[site][1], before[site][1])


def test_untouched_places_keep_minus_zero_nan_and_infinity() -> None:
    model = make_model("gpt2")
    backbone(model).ln_f = nn.Identity()
    odd = torch.tensor([-0.0, math.nan, math.inf, -1.0]).repeat(2, 3, WIDTH // 4)
    with steer(model, Intervention("final_post_norm", torch.ones(1, WIDTH), torch.tensor([0.0, 1.0]))):
        out = final_norm(model)(odd)
    assert torch.equal(out[0].view(torch.int32), odd[0].view(torch.int32))
    assert out[1, 0, 3] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "some"}, "tokens: expected all, new, prompt or a mask, got 'some'"),
        ({"tokens": torch.ones(2, 3)}, r"expected a boolean mask \[row, token\], got torch.float32 \[2, 3\]"),
        ({"coefficients": math.nan}, "coefficients: expected finite numbers"),
        ({"coefficients": torch.ones(2, 3)}, r"expected a number, \[row\], \[row, 1\].* got \[2, 3\]"),
        ({"coefficients": torch.ones(2, 1, 1, 1)}, r"got \[2, 1, 1, 1\]"),
        ({"vectors": torch.ones(4)}, r"vectors: expected floating-point \[vector, d_model\], got torch.float32 \[4\]"),
        ({"vectors": torch.ones(1, 4).long()}, "got torch.int64"),
        ({"operator": "rotate"}, "rotate: expected the two vectors"),
    ],
)
def test_an_intervention_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Intervention(**({"site": "layer_00", "vectors": torch.ones(1, 4)} | options))
    assert str(caught.value).startswith("steering: ")
    assert "\n" not in str(caught.value)
