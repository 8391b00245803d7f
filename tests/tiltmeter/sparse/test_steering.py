"""Steering by sparse features: golden values, gradients, the literal formula as second implementation, and inside a model."""

import math

import pytest
import torch
from torch import Tensor

from tests.tiltmeter.sparse.dictionaries import noise
from tests.tiny_models import make_model, random_pairs
from tiltmeter.errors import UserError
from tiltmeter.models.lora import adapters_disabled, plain_state
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.sparse.autoencoder import JumpReLU, SaeId, SparseAutoencoder, TopK
from tiltmeter.sparse.steering import (
    SparseOptions,
    SparseSteering,
    SparsityPenalty,
    effective_steering,
    insert_steering,
    response_tokens,
    soft_threshold,
    sparse_steering,
)
from tiltmeter.sparse.training import unit_decoder_rows

IDS = torch.tensor([[1, 2, 3, 4, 5, 9, 8]])
WIDTH = 24


def random_sae(
    d_model: int, *, site: str = "layer_00", norm: str = "none", dtype: torch.dtype = torch.float64
) -> SparseAutoencoder:
    sae = JumpReLU(SaeId(site), d_model, WIDTH, norm=norm).to(dtype)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sae.named_parameters()):
            values = noise(*parameter.shape, seed=i, dtype=torch.float64)
            parameter.copy_(values.abs() / 4 if name == "threshold" else values / 2)
    return sae


def loosened(steering: SparseSteering, *, seed: int = 0) -> SparseSteering:
    """A steering with weights large enough to change much, in float64."""
    steering = steering.double()
    with torch.no_grad():
        for i, parameter in enumerate((steering.weight, steering.bias)):
            parameter.copy_(noise(*parameter.shape, seed=seed + i, dtype=torch.float64))
        steering.threshold.copy_(noise(WIDTH, seed=seed + 5, dtype=torch.float64).abs() / 2)
    return steering


def literal(steering: SparseSteering, x: Tensor) -> Tensor:
    """The paper's formulas one by one, with SAE(x) computed and its error kept without gradient."""
    sae = steering.sae
    f = sae.encode(x)
    a = x @ steering.weight.t() + steering.bias
    s = torch.sign(a) * torch.maximum(a.abs() - steering.threshold, torch.zeros_like(a))
    return sae.decode(torch.relu(f + s), like=x) + (x - sae.decode(f, like=x)).detach()


def test_golden_values_of_the_soft_threshold_and_of_what_it_does() -> None:
    a, one = torch.tensor([3.0, -3.0, 0.5, -1.0]), torch.ones(4)
    assert soft_threshold(a, one).tolist() == [2, -2, 0, 0]
    assert soft_threshold(a, torch.full((4,), math.inf)).tolist() == [0, 0, 0, 0]
    assert torch.equal(soft_threshold(a, -one), a), "a threshold below 0 is 0"
    f, s = torch.tensor([0.0, 0.0, 2.0, 2.0, 2.0]), torch.tensor([-1.0, 1.0, -0.5, -3.0, 0.0])
    assert effective_steering(f, s).tolist() == [0, 1, -0.5, -2, 0]


@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
def test_states_and_gradients_are_those_of_the_literal_formula(norm: str) -> None:
    steering = loosened(SparseSteering(random_sae(8, norm=norm)))
    x, weights = noise(2, 5, 8, dtype=torch.float64), noise(2, 5, 8, seed=7, dtype=torch.float64)
    found, expected = steering(x), literal(steering, x)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    trained = (steering.weight, steering.bias, steering.threshold)
    pairs = (torch.autograd.grad((each * weights).sum(), trained) for each in (found, expected))
    for ours, theirs in zip(*pairs, strict=True):
        assert bool((ours != 0).any())
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    steering = loosened(SparseSteering(random_sae(6)))
    x = noise(1, 3, 6, seed=2, dtype=torch.float64)

    def steered(weight: Tensor, bias: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        changed = dict(zip(("weight", "bias", "threshold"), (weight, bias, threshold), strict=True))
        out = torch.func.functional_call(steering, changed, (x,))
        assert steering.last is not None
        return out, steering.last.l1

    inputs = [p.detach().clone().requires_grad_() for p in (steering.weight, steering.bias, steering.threshold)]
    assert torch.autograd.gradcheck(steered, inputs)


def test_nothing_is_steered_where_s_is_0() -> None:
    steering = loosened(SparseSteering(random_sae(8)))
    x = noise(2, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        steering.threshold.fill_(math.inf)
    assert torch.equal(steering(x), x)
    with torch.no_grad():
        steering.threshold.zero_()
    assert not torch.equal(steering(x), x)
    steering.ablated = torch.ones(WIDTH, dtype=torch.bool)
    assert torch.equal(steering(x), x), "every feature ablated"
    assert steering.last is not None
    assert steering.last.l1.sum() == steering.last.l0.sum() == 0


def test_one_active_feature_moves_the_state_along_its_decoder_row() -> None:
    sae = random_sae(8)
    steering = SparseSteering(sae).double()
    x = noise(1, 1, 8, dtype=torch.float64)
    j = int(sae.encode(x)[0, 0].argmax())
    with torch.no_grad():
        steering.weight.zero_()
        steering.bias[j] = 0.75
        steering.threshold.fill_(0.25)
    torch.testing.assert_close(steering(x) - x, 0.5 * sae.decoder_weight[j].expand(1, 1, 8), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        off = int((sae.encode(x)[0, 0] == 0).nonzero()[0])
        steering.bias.zero_()
        steering.bias[off] = -5.0
    assert torch.equal(steering(x), x), "a feature that is off can't be turned down"
    assert steering.last is not None
    assert (steering.last.l0.item(), steering.last.l0_effective.item()) == (1, 0)
    assert (steering.last.l1.item(), steering.last.l1_effective.item()) == (4.75, 0)


def test_padding_does_not_change_the_penalty() -> None:
    model = make_model("llama", torch.float64)
    steering = loosened(insert_steering(model, random_sae(32), SparseOptions("here")))
    found = []
    for filler in (0, 9):
        batch = collate_pairs(random_pairs(4), pair_index=range(4), layout="concatenated", pad_id=filler)
        assert batch.n_padding > 0
        sequence_log_probs(model, batch)
        penalty = SparsityPenalty(1.0)
        penalty.begin(int(response_tokens(batch).sum()))
        found.append(penalty.of(steering, batch))
    assert float(found[0].detach()) > 0
    assert torch.equal(found[0], found[1])


def test_thresholds_below_0_are_clamped_with_one_line() -> None:
    steering = SparseSteering(random_sae(8))
    assert steering.clamp_thresholds() is None
    with torch.no_grad():
        steering.threshold[3:5] = -0.1
    assert steering.clamp_thresholds() == "sparse steering: 2 of 24 thresholds were driven below 0 and are 0 now"
    assert float(steering.threshold.detach().min()) == 0
    steering(noise(1, 2, 8, dtype=torch.float64).float()).sum().backward()
    assert steering.threshold.grad is not None, "one at 0 can still grow"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_fresh_steering_changes_no_logit_by_more_than_1e_5(family: str) -> None:
    attention = "eager" if family == "gemma2" else "sdpa"
    plain, steered = (make_model(family, torch.float32, attention) for _ in range(2))
    before = plain(IDS).logits
    sae = random_sae(plain.config.hidden_size, dtype=torch.float32)
    unit_decoder_rows(sae)  # as those of published autoencoders are
    insert_steering(steered, sae, SparseOptions("here"))
    change = (steered(IDS).logits - before).abs().max()
    assert 0 < change <= 1e-5


def test_inside_a_model_it_acts_at_its_site_and_can_be_switched_off() -> None:
    plain, model = make_model("llama", torch.float64), make_model("llama", torch.float64)
    sae = random_sae(plain.config.hidden_size, site="final_post_norm")
    steering = loosened(insert_steering(model, sae, SparseOptions("here")))
    hidden = plain.model(IDS).last_hidden_state
    torch.testing.assert_close(model(IDS).logits, plain.lm_head(literal(steering, hidden)))
    with adapters_disabled(model):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert sparse_steering(model) is steering
    assert sparse_steering(plain) is None
    assert plain_state(model).keys() == plain.state_dict().keys()


def test_only_the_steering_learns() -> None:
    model = make_model("llama", torch.float64)
    steering = loosened(insert_steering(model, random_sae(model.config.hidden_size), SparseOptions("here")))
    model(IDS).logits[0, :, 7].sum().backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert names == {f"sparse_steering.{part}" for part in ("weight", "bias", "threshold")}
    assert all(parameter.grad is None for parameter in steering.sae.parameters())


def test_steering_that_does_not_fit_or_makes_no_sense_is_refused() -> None:
    model = make_model("llama")
    with pytest.raises(UserError, match=r"expected width 32, .* got 31"):
        insert_steering(model, TopK(SaeId("layer_00"), 31, WIDTH, k=2), SparseOptions("here"))
    with pytest.raises(UserError, match="layer_99"):
        insert_steering(model, TopK(SaeId("layer_99"), 32, WIDTH, k=2), SparseOptions("here"))
    other = TopK(SaeId("layer_00", weights="0" * 64), 32, WIDTH, k=2)
    with pytest.raises(UserError, match="other weights"):
        insert_steering(model, other, SparseOptions("here"))
    insert_steering(model, other, SparseOptions("here", any_model=True))
    with pytest.raises(UserError, match="threshold: expected more than 0, got 0"):
        SparseOptions("here", threshold=0.0)
    with pytest.raises(UserError, match="sparsity: expected at least 0, got -1"):
        SparseOptions("here", sparsity=-1)


def test_the_penalty_is_the_mean_over_response_tokens_however_a_step_is_cut() -> None:
    pairs = random_pairs(5, seed=3)
    model = make_model("llama", torch.float64)
    steering = loosened(insert_steering(model, random_sae(32), SparseOptions("here")))
    n_tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    totals, gradients, means = [], [], []
    for layout, cuts in (("shared_prefix", [5]), ("concatenated", [2, 3]), ("shared_prefix", [1, 1, 3])):
        penalty = SparsityPenalty(0.25)
        penalty.begin(n_tokens)
        steering.zero_grad()
        total, at = torch.zeros(()), 0
        for n in cuts:
            batch = collate_pairs(pairs[at : at + n], pair_index=range(at, at + n), layout=layout)
            assert int(response_tokens(batch).sum()) == sum(
                len(p.chosen_ids) + len(p.rejected_ids) for p in pairs[at : at + n]
            )
            sequence_log_probs(model, batch)
            part = penalty.of(steering, batch)
            part.backward()
            total, at = total + part.detach(), at + n
        assert steering.weight.grad is not None
        totals.append(total)
        gradients.append(steering.weight.grad.clone())
        means.append(penalty.means())
    for other in (1, 2):
        torch.testing.assert_close(totals[other], totals[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(gradients[other], gradients[0], rtol=1e-6, atol=1e-12)
    by_hand = 0.0
    for pair in pairs:
        for response in (pair.chosen_ids, pair.rejected_ids):
            model(torch.tensor([[*pair.prompt_ids, *response]]))
            assert steering.last is not None
            by_hand += float(steering.last.l1[0, len(pair.prompt_ids) :].detach().sum())
    assert float(totals[0]) == pytest.approx(0.25 * by_hand / n_tokens, rel=1e-6)
    assert float(means[0]["l1"]) == pytest.approx(by_hand / n_tokens, rel=1e-6)
    assert means[0]["l0_effective"] <= means[0]["l0"]


def test_fillers_have_no_response_tokens() -> None:
    batch = collate_pairs(random_pairs(2), pair_index=[0, 1], weights=[0.0, 0.0])
    assert not response_tokens(batch).any()
