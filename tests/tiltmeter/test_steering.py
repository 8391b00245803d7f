import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from tests.tiny_models import LAYERS, VOCAB, WIDTH, make_model
from tiltmeter.capture import capture
from tiltmeter.errors import UserError
from tiltmeter.layers import all_sites, backbone, decoder_blocks, final_norm, unembedding
from tiltmeter.positions import Readings
from tiltmeter.steering import Intervention, steer
from tiltmeter.steering_operators import OPERATORS, Operator
from tiltmeter.steering_vector import SteeringVector

SITES = all_sites(LAYERS)
GOLDEN_FAMILIES = ("llama", "gpt2", "gemma2", "cohere")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def n_hooks(model: PreTrainedModel) -> int:
    modules = [backbone(model), *decoder_blocks(model), final_norm(model)]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def model_of(family: str, **options: Any) -> PreTrainedModel:
    return make_model(family, torch.float64, "eager" if family == "gemma2" else "sdpa", **options)


def ids_of(rows: int = 3, tokens: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def run(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Hidden states at every site, and the logits."""
    zeros = torch.zeros(ids.numel(), dtype=torch.long)
    wanted = Readings(torch.arange(ids.numel()), None, zeros, zeros, zeros, (ids.shape[0], ids.shape[1]))
    with torch.no_grad(), capture(model, SITES, {"response_all": wanted}) as captured:
        logits = model(input_ids=ids, use_cache=False, **inputs).logits
    return {point.site: rows.reshape(*ids.shape, -1) for point, rows in captured.items()}, logits


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


def test_nothing_is_written_in_place() -> None:
    model, v = make_model("gpt2"), noise(1, WIDTH)
    hidden = noise(2, 3, WIDTH, dtype=torch.float32)
    kept = hidden.clone()
    with steer(model, Intervention("final_pre_norm", v)):
        final_norm(model)(hidden)
    assert torch.equal(hidden, kept)


def test_a_capture_reads_what_was_there_when_it_was_opened() -> None:
    model, ids, v = model_of("gpt2"), ids_of(), noise(1, WIDTH)
    zeros = torch.zeros(ids.numel(), dtype=torch.long)
    wanted = {"response_all": Readings(torch.arange(ids.numel()), None, zeros, zeros, zeros, (3, 6))}
    outside, inside = (capture(model, "layer_00", wanted) for _ in range(2))
    with torch.no_grad(), outside as before, steer(model, Intervention("layer_00", v)), inside as after:
        model(input_ids=ids)
    (own,), (steered,) = before.values(), after.values()
    assert torch.equal(steered, own + v)


def test_gradients_reach_vectors_and_coefficients() -> None:
    model, ids = model_of("gpt2"), ids_of(2, 4)
    v, strength = noise(1, WIDTH).requires_grad_(), torch.tensor([0.5, 0.0], dtype=torch.float64, requires_grad=True)

    def loss(v: Tensor, strength: Tensor) -> Tensor:
        with steer(model, Intervention("layer_00", v, strength)):
            return model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[..., 7].sum()

    grad_v, grad_strength = torch.autograd.grad(loss(v, strength), [v, strength])
    step = 1e-5
    with torch.no_grad():
        along = [loss(v + sign * step * v, strength) for sign in (1, -1)]
        by_strength = [loss(v, strength + sign * step * torch.tensor([1.0, 0.0])) for sign in (1, -1)]
    assert float((grad_v * v.detach()).sum()) == pytest.approx(float((along[0] - along[1]) / (2 * step)), rel=1e-6)
    assert float(grad_strength[0]) == pytest.approx(float((by_strength[0] - by_strength[1]) / (2 * step)), rel=1e-6)


@pytest.mark.parametrize("operator", OPERATORS)
def test_vectors_learn_in_every_pass_of_one_with_whatever_ran_before(operator: Operator) -> None:
    model, ids = make_model("gpt2"), ids_of(2, 4)
    v = noise(2, WIDTH, dtype=torch.float32).requires_grad_()
    gradients = []
    with steer(model, Intervention("layer_00", v, 0.5, operator)):
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        for _ in range(2):
            loss = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[..., 7].sum()
            gradients.append(torch.autograd.grad(loss, v)[0])
    assert gradients[0].abs().max() > 1e-4
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpointed_blocks_have_the_same_gradients(family: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        model, v = model_of(family), noise(1, WIDTH).requires_grad_()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        losses = []
        for seed in (0, 1):  # both recomputed after the hooks are gone
            ids = ids_of(2, 4 + seed, seed)
            with steer(model, Intervention("layer_00", v, float(seed + 1), tokens="prompt"), prompt_width=3):
                losses.append(model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[..., 7].sum())
        sum(losses, torch.tensor(0.0)).backward()
        gradients.append([v.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert gradients[0][0].abs().max() > 1e-3
    assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


def test_autocast_does_not_round_the_vectors() -> None:
    model, v = make_model("gpt2"), noise(2, WIDTH, dtype=torch.float32)
    hidden, strengths = noise(2, 3, WIDTH, dtype=torch.float32), noise(2, 2, seed=1, dtype=torch.float32)
    backbone(model).ln_f = nn.Identity()
    with steer(model, Intervention("final_post_norm", v, strengths)), torch.autocast("cpu", torch.bfloat16):
        out = final_norm(model)(hidden)
    assert_close(out, hidden + (strengths @ v)[:, None])


def test_blocks_that_return_tuples_keep_what_else_they_return() -> None:
    model, v = model_of("gpt2"), noise(1, WIDTH)

    class Pair(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str]:
            return self.block(*args, **kwargs), "weights"

    pair = Pair(decoder_blocks(model)[0])
    decoder_blocks(model)[0] = pair
    hidden = noise(3, 6, WIDTH)
    with steer(model, Intervention("layer_00", v)):
        out, rest = pair(hidden)
    assert rest == "weights"
    assert_close(out, pair(hidden)[0] + v)


def test_hooks_are_gone_after_an_exception_and_when_a_later_intervention_does_not_fit() -> None:
    model, ids, v = model_of("gpt2"), ids_of(), noise(1, WIDTH)

    def stop(_module: nn.Module, _inputs: Any) -> None:
        assert n_hooks(model) == 3
        raise RuntimeError("midway")

    handle = decoder_blocks(model)[1].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="midway"), steer(model, Intervention("layer_00", v)):
        model(input_ids=ids)
    handle.remove()
    assert n_hooks(model) == 0
    wrong = [
        (Intervention("layer_02", v), "layer_02: this model has 2 blocks"),
        (Intervention("layer_1", v), "expected final_pre_norm"),
        (
            Intervention("layer_00", v[:, 1:]),
            f"expected width {WIDTH}, that of the model's hidden states, got {WIDTH - 1}",
        ),
    ]
    for second, message in wrong:
        with pytest.raises(UserError, match=message), steer(model, [Intervention("layer_00", v), second]):
            pytest.fail("not to be reached")
        assert n_hooks(model) == 0


def test_a_model_that_fails_halfway_through_attaching_keeps_no_hook() -> None:
    model, v = model_of("gpt2"), noise(1, WIDTH)
    del backbone(model).ln_f
    interventions = [Intervention("layer_00", v), Intervention("final_post_norm", v)]
    with pytest.raises(UserError, match="expected a final norm"), steer(model, interventions):
        pytest.fail("not to be reached")
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


def test_steering_vectors_become_an_intervention_at_their_site() -> None:
    a = SteeringVector("layer_00", noise(WIDTH, dtype=torch.float32), made="a")
    both = Intervention.along([a, 2 * a], 0.5, operator="add", tokens="new")
    assert (both.site, both.operator, both.tokens, both.n_strengths) == ("layer_00", "add", "new", 2)
    assert torch.equal(both.vectors[1], 2 * a.values)
    with pytest.raises(UserError, match="make an intervention for each site"):
        Intervention.along([a, SteeringVector("layer_01", a.values, made="b")])
    with pytest.raises(UserError, match=r"expected vectors of one site and width, got \[\]"):
        Intervention.along([])


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("is_compiled_before", [True, False])
def test_compiled_blocks_are_steered_and_afterwards_are_not(is_compiled_before: bool) -> None:
    plain, model, ids, v = model_of("gpt2"), model_of("gpt2"), ids_of(), noise(1, WIDTH)
    for block in decoder_blocks(model):
        block.compile(dynamic=True)
    intervention = Intervention("layer_00", v, torch.tensor([0.0, 1.0, -1.0]))
    with torch.no_grad():
        expected = plain(input_ids=ids, use_cache=False).logits
        with steer(plain, intervention):
            expected_steered = plain(input_ids=ids, use_cache=False).logits
        if is_compiled_before:
            assert_close(model(input_ids=ids, use_cache=False).logits, expected)
        with steer(model, intervention):
            assert_close(model(input_ids=ids, use_cache=False).logits, expected_steered)
        assert_close(model(input_ids=ids, use_cache=False).logits, expected)
