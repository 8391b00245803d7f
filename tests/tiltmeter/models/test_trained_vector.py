"""A vector that is trained: it changes nothing before its first step, is off for the reference, and is all that learns."""

import pytest
import torch

from tests.tiny_models import make_model
from tiltmeter.errors import UserError
from tiltmeter.models.lora import adapters_disabled, plain_state
from tiltmeter.models.trained_vector import VectorOptions, insert_vector, trained_vector
from tiltmeter.steering.intervene import Intervention, steer

IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.mark.parametrize("site", ["layer_00", "final_pre_norm", "final_post_norm"])
def test_model_with_a_vector_computes_what_steering_along_it_does(site: str) -> None:
    plain, trained = make_model("llama", torch.float64), make_model("llama", torch.float64)
    options = VectorOptions(site, scale=10)
    values = torch.randn(plain.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = plain(IDS).logits
    vector = insert_vector(trained, options).double()
    assert torch.equal(trained(IDS).logits, before), "it starts at 0"
    with torch.no_grad():
        vector.d.copy_(values / 10)
    with steer(plain, Intervention(vector.site, values[None])):
        expected = plain(IDS).logits
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(trained(IDS).logits, expected)
    with adapters_disabled(trained):
        assert torch.equal(trained(IDS).logits, before)
    torch.testing.assert_close(trained(IDS).logits, expected)
    assert plain_state(trained).keys() == plain.state_dict().keys()


def test_only_the_vector_learns_and_its_gradient_is_that_of_the_hidden_states() -> None:
    model = make_model("llama", torch.float64)
    vector = insert_vector(model, VectorOptions("final_post_norm", scale=3)).double()
    model(IDS).logits[0, :, 7].sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["trained_vector.d"]
    assert vector.d.grad is not None
    torch.testing.assert_close(vector.d.grad, 3 * IDS.shape[1] * model.lm_head.weight[7].detach())
    assert trained_vector(model) is vector
    assert trained_vector(make_model("llama")) is None


def test_vector_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="scale: expected more than 0, got 0"):
        VectorOptions(scale=0)
    with pytest.raises(UserError, match="layer_99"):
        insert_vector(make_model("llama"), VectorOptions("layer_99"))
    with pytest.raises(UserError, match="a vector of 3 numbers, expected"):
        insert_vector(make_model("llama"), VectorOptions(), torch.zeros(3))
