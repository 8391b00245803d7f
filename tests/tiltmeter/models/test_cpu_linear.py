import copy

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tests.tiny_models import make_model
from tiltmeter.models import cpu_linear
from tiltmeter.models.cpu_linear import CPULinear, fast_linear, linear, onednn_is_faster, use_fast_linear

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (1, 1, 8)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_torch(
    shape: tuple[int, ...], with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: True)
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True), torch.randn(6, 8, requires_grad=True)]
    inputs += [torch.randn(6, requires_grad=True)] if with_bias else []
    results = []
    for function in (linear, F.linear):
        made = function(*inputs)
        results.append([made, *torch.autograd.grad(made.square().sum(), inputs)])
    assert results[0][0].grad_fn.name() == "_LinearBackward"
    assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_cpu_linear_takes_other_dtypes_and_frozen_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: True)
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), weight.float()).dtype == torch.bfloat16
    hidden = torch.randn(3, 4, requires_grad=True)
    linear(hidden, weight.float()).sum().backward()
    assert_close(hidden.grad, weight.float().sum(0).expand(3, 4))


def test_a_model_keeps_its_names_and_numbers_and_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: True)
    plain, fast = make_model("llama"), make_model("llama")
    assert use_fast_linear(fast) == 2 * 7 + 1
    assert use_fast_linear(fast) == 0
    assert isinstance(copy.deepcopy(fast).model.layers[0].mlp.up_proj, CPULinear)
    assert list(plain.state_dict()) == list(fast.state_dict())
    ids = torch.arange(3, 20)[None]
    assert_close(plain(input_ids=ids).logits, fast(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_fast_linear_layers_are_plain_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    kinds = [type(module) for module in model.modules()]
    for faster in (True, False):
        monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda faster=faster: faster)
        with fast_linear(model):
            assert sum(type(module) is CPULinear for module in model.modules()) == (15 if faster else 0)
        assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize(("vendor", "faster"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_onednn_is_chosen_by_the_processor(vendor: str, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("pathlib.Path.exists", lambda _: True)
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: f"vendor_id : {vendor}")
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert onednn_is_faster.__wrapped__() is (faster and both)
