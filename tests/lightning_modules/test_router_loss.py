"""The load-balancing loss of experts: transformers' own number, in the gradient with the model's weight, and its absence said."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_modules.dpo import DPOModule
from tests.tiny_models import ARCHITECTURES, fit, lightning_warnings, make_data, make_model, random_pairs
from tiltmeter.errors import UserError
from tiltmeter.pairs.batch import PAD, collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.pairs.router_loss import log_probs_and_router_loss, router_coefficient

pytestmark = lightning_warnings
LOCAL = ARCHITECTURES["mistral"] | {"num_local_experts": 4, "num_experts_per_tok": 2}
OWN = ARCHITECTURES["llama"] | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "olmoe": OWN,
    "qwen2_moe": OWN | {"shared_expert_intermediate_size": 16},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_the_loss_is_that_of_transformers_on_the_same_rows(family: str) -> None:
    model = make_model(family, torch.float32, "eager", **EXPERTS[family])
    pairs = random_pairs(5)
    batch = collate_pairs(pairs, pair_index=range(5), layout="concatenated")
    logps, loss = log_probs_and_router_loss(model, batch)
    real = batch.segments != PAD
    theirs = model(batch.input_ids, attention_mask=real.long(), output_router_logits=True, use_cache=False).aux_loss
    assert_close(loss, theirs, rtol=1e-5, atol=0)
    assert_close(logps, sequence_log_probs(model, batch), rtol=0, atol=0)
    shared = log_probs_and_router_loss(model, collate_pairs(pairs, pair_index=range(5)))
    assert_close(shared[0], logps, rtol=1e-4, atol=1e-4)
    assert 2 <= float(shared[1].detach()) < 4 + 1e-6


def router_weights(module: DPOModule) -> Tensor:
    named = module.trained_policy.model.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in named if name.endswith("mlp.gate.weight")])


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_run_adds_it_with_the_model_s_weight_and_logs_it_apart(
    activation_checkpointing: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "mixtral", LOCAL | {"router_aux_loss_coef": 0.5})

    def trained(weight: float | None) -> DPOModule:
        options: dict[str, Any] = {"router_aux_loss": weight, "activation_checkpointing": activation_checkpointing}
        module = DPOModule(learning_rate=1e-3, warmup_share=0.0, **options)
        fit(module, make_data(6, pairs_per_step=6), family="mixtral", dtype="float32", max_steps=1)
        return module

    by_default = trained(None)
    assert "Experts: load-balancing loss × 0.5" in capsys.readouterr().out
    asked, none = trained(0.5), trained(0)
    assert_close(router_weights(by_default), router_weights(asked), rtol=0, atol=0)
    assert not torch.allclose(router_weights(by_default), router_weights(none))
    logged = by_default.trainer.callback_metrics
    assert logged["train/loss"] == none.trainer.callback_metrics["train/loss"]
    assert 2 <= logged["train/router_loss"] < 4
    assert "train/router_loss" not in none.trainer.callback_metrics


def test_a_model_without_experts_has_none_and_refuses_a_weight() -> None:
    model = make_model("llama")
    assert router_coefficient(model) == 0
    with pytest.raises(UserError, match=r"router_aux_loss=0\.1: LlamaForCausalLM has no load-balancing loss"):
        router_coefficient(model, 0.1)
