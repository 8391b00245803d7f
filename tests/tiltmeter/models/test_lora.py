"""LoRA where a block is more than linear maps: experts, maps whose weights are read directly, and merges that can't be done."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from tests.tiny_models import ARCHITECTURES, LAYERS, largest_difference, make_model, random_pairs, reference_log_probs
from tiltmeter.errors import UserError
from tiltmeter.models.lora import add_lora, merged_state, why_not_merged

EXPERTS = ARCHITECTURES["mistral"] | {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"hidden_size": 32, "num_hidden_layers": LAYERS, "state_size": 4}


def mixtral(**changes: Any) -> PreTrainedModel:
    return make_model("mixtral", **EXPERTS | changes)


def with_adapters(model: PreTrainedModel) -> PreTrainedModel:
    add_lora(model, LoraConfig(r=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def test_adapters_of_experts_are_merged_exactly() -> None:
    pairs = random_pairs(3)
    adapted = with_adapters(mixtral())
    with torch.no_grad():
        after, before = reference_log_probs(adapted, pairs), reference_log_probs(mixtral(), pairs)
        whole, plain = with_adapters(mixtral()), mixtral()
        state = merged_state(whole, adapted.state_dict())
        plain.load_state_dict(state)
        assert largest_difference(reference_log_probs(plain, pairs), after) < 1e-5
    assert largest_difference(before, after) > 0.1
    assert any("experts" in name for name, _ in adapted.named_parameters() if "lora_" in name)


def test_a_merge_is_tried_without_weights_and_leaves_the_options_as_they_are() -> None:
    config = LoraConfig(r=2)
    with torch.device("meta"):
        empty = mixtral()
    assert why_not_merged(empty, config) is None
    assert config.target_modules is None


def test_a_merge_that_cannot_be_done_is_known_before_and_refused_after(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = with_adapters(make_model("llama"))
    state = {name: weight.clone() for name, weight in adapted.state_dict().items()}

    def endless(self: Any, **_options: Any) -> None:
        raise RecursionError("maximum recursion depth exceeded")

    for kind in [kind for kind in LoraLayer.__subclasses__() if hasattr(kind, "merge")]:
        monkeypatch.setattr(kind, "merge", endless)
    assert why_not_merged(make_model("llama"), LoraConfig(r=2)) == "maximum recursion depth exceeded"
    with pytest.raises(UserError, match=r"^these adapters can't be merged \(maximum recursion depth exceeded\)$"):
        merged_state(adapted, state)


def test_a_merge_that_gives_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = with_adapters(make_model("llama"))
    state = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    monkeypatch.setattr("peft.tuners.lora.Linear.merge", lambda self, **_options: None)
    with pytest.raises(UserError, match="the merged model gives other log-probs than the adapted one"):
        merged_state(adapted, state)


def test_maps_whose_weights_a_family_reads_past_their_adapters_are_refused_with_the_others_named() -> None:
    def refusal(**options: Any) -> str:
        with pytest.raises(UserError) as caught:
            add_lora(make_model("mamba", attn="eager", **MAMBA), LoraConfig(r=2, **options))
        return str(caught.value)

    assert "target_modules=[dt_proj,in_proj,x_proj]" in refusal()
    said = refusal(target_modules=["dt_proj", "in_proj", "x_proj"])
    assert "MambaForCausalLM reads the weights of dt_proj past their adapters" in said
    assert said.endswith("target_modules=[in_proj,x_proj]")
    add_lora(make_model("mamba", attn="eager", **MAMBA), LoraConfig(r=2, target_modules=["in_proj", "x_proj"]))
