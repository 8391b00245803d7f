import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.tiltmeter.steered import ids_of, model_of, noise
from tests.tiny_models import WIDTH, make_model
from tiltmeter.models.layers import backbone, final_norm
from tiltmeter.steering.intervene import Intervention, steer
from tiltmeter.steering.operators import OPERATORS, Operator


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
