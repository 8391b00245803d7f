"""Dropout of adapters: it acts in training steps and nowhere else, so that the reference and every figure are without it."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from lightning_modules.dpo import DPOModule
from tests.tiny_models import fit, lightning_warnings, make_data
from tiltmeter.models.lora import adapter_dropout
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs

pytestmark = lightning_warnings


def trained(rate: float, **options: Any) -> DPOModule:
    lora = LoraConfig(r=4, lora_dropout=rate)
    module = DPOModule(learning_rate=1e-2, warmup_share=0.0, lora=lora, **options)
    fit(module, make_data(12, pairs_per_step=4), family="llama", dtype="float64")
    return module


def adapters(module: DPOModule) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_dropout_of_adapters_changes_what_is_learned_and_not_the_reference(activation_checkpointing: bool) -> None:
    torch.manual_seed(0)
    with_it = trained(0.5, activation_checkpointing=activation_checkpointing)
    torch.manual_seed(0)
    without = trained(0.0)
    assert torch.equal(with_it.reference["train"], without.reference["train"])
    moved, plain = adapters(with_it), adapters(without)
    assert any(not torch.allclose(moved[name], plain[name]) for name in plain if "lora_B" in name)


def test_outside_training_steps_a_model_in_training_mode_drops_nothing() -> None:
    module = trained(0.5)
    model, pairs = module.trained_policy.model.train(), module.data.splits["train"].pairs
    batch = collate_pairs(pairs, pair_index=range(len(pairs)))
    with torch.no_grad():
        first, again = (sequence_log_probs(model, batch) for _ in range(2))
        with adapter_dropout(model, 0.5):
            dropped, other = (sequence_log_probs(model, batch) for _ in range(2))
        after = sequence_log_probs(model, batch)
    assert torch.equal(first, again)
    assert torch.equal(first, after)
    assert not torch.allclose(dropped, other)
