from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.tiltmeter.steered import ids_of, model_of, n_hooks, noise
from tests.tiny_models import WIDTH, make_model
from tiltmeter.errors import UserError
from tiltmeter.models.layers import backbone, decoder_blocks, final_norm
from tiltmeter.states.capture import capture
from tiltmeter.states.positions import Readings
from tiltmeter.steering.intervene import Intervention, steer


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("is_compiled_before", [True, False])
def test_compiled_blocks_are_steered_and_afterwards_are_not(is_compiled_before: bool) -> None:
    plain, model, ids, v = model_of("gpt2"), model_of("gpt2"), ids_of(), noise(1, WIDTH)
    for block in decoder_blocks(model):
        block.compile(dynamic=True, backend="aot_eager")  # hooks are guarded before any backend
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
