"""A model that is random in training mode is refused before its first step: its policy would not be its reference."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny_models import ARCHITECTURES, make_model
from tiltmeter.errors import UserError
from tiltmeter.pairs.verification import verify_no_randomness

MIXTRAL = ARCHITECTURES["mistral"] | {"num_local_experts": 4, "num_experts_per_tok": 2}


def mixtral(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **MIXTRAL | changes))


class Draws(nn.Module):
    """Adds noise that no setting tells of, in some passes only."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        noise = torch.randn(out.shape) * (torch.rand(()) < self.share)
        return out + noise if self.training else out


def refusal(model: PreTrainedModel) -> str:
    with pytest.raises(UserError, match="is random in training mode") as caught:
        verify_no_randomness(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_router_noise_is_refused_with_its_setting() -> None:
    said = refusal(mixtral(router_jitter_noise=0.1))
    assert said.startswith("model: MixtralForCausalLM is random in training mode (model.layers.0.mlp")
    assert "set router_jitter_noise (0.1) to 0" in said
    verify_no_randomness(mixtral())


def test_dropout_that_a_model_was_built_with_is_refused_with_its_module() -> None:
    model = make_model("gpt2", resid_pdrop=0.1)
    said = refusal(model)
    assert "(transformer.h.0.attn.resid_dropout)" in said
    assert "resid_pdrop (0.1)" in said


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_noise_of_no_setting_is_refused_with_its_module(share: float) -> None:
    model = make_model("llama")
    model.model.layers[1].mlp = Draws(model.model.layers[1].mlp, share)
    assert "(model.layers.1.mlp), so" in refusal(model)


def test_noise_that_changes_nothing_is_accepted() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp = Draws(model.model.layers[1].mlp, 0.0)
    verify_no_randomness(model)


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_random_state_and_mode_as_they_were(training: bool) -> None:
    model = mixtral(router_jitter_noise=0.1).train(training)
    before = torch.get_rng_state()
    refusal(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training is training
