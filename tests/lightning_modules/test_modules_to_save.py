"""Modules trained whole beside LoRA's adapters: peft's own loop in numbers, the base for a reference, plain once merged."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_modules.dpo import DPOModule
from tests.tiny_models import (
    ARCHITECTURES,
    fit,
    largest_difference,
    lightning_warnings,
    make_data,
    make_model,
    random_pairs,
    reference_log_probs,
)
from tiltmeter.errors import UserError
from tiltmeter.models.lora import (
    adapters_disabled,
    add_lora,
    insert_adapters,
    is_trained,
    merged_state,
    plain_state,
    why_not_merged,
)
from tiltmeter.pairs.reference_cache import hash_weights

pytestmark = [
    lightning_warnings,
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore:Model has `tie_word_embeddings=True`"
    ),
]
RATE, STEPS, BETAS = 3e-3, 10, (0.9, 0.98)
EMBEDDINGS = ["embed_tokens", "lm_head"]


def lora(*modules: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", modules_to_save=list(modules), **options)


class Watched(DPOModule):
    """Keeps what it begins with, what it is given and what it finds."""

    def __init__(self, config: LoraConfig) -> None:
        super().__init__(
            learning_rate=RATE, warmup_share=0.0, schedule="constant", weight_decay=0.0, betas=BETAS, lora=config
        )
        self.start: dict[str, Tensor] = {}
        self.rows: list[list[int]] = []
        self.losses: list[float] = []

    def on_model_built(self, model: PreTrainedModel) -> None:
        super().on_model_built(model)
        self.start = {name: weight.detach().clone() for name, weight in model.state_dict().items()}

    def training_step(self, step: Any, batch_idx: int) -> None:
        super().training_step(step, batch_idx)
        self.rows.append([int(row) for batch in step.micro_batches for row in batch.pair_index[batch.weights > 0]])
        self.losses.append(float(self.trainer.callback_metrics["train/loss"]))


def run(config: LoraConfig, *, max_steps: int = STEPS, dtype: str = "float64", **options: Any) -> Watched:
    module = Watched(config)
    torch.manual_seed(0)
    precision = {"float64": "64-true", "float32": "32-true", "bfloat16": "32-true"}[dtype]
    data = make_data(20, pairs_per_step=4, tokens_per_micro_batch=150)
    fit(module, data, **({"family": "llama", "dtype": dtype, "precision": precision, "max_epochs": 2} | options),
        max_steps=max_steps)  # fmt: skip
    return module


def base_of(module: Watched) -> PreTrainedModel:
    base = module.factory.make_base()
    return base.eval()


def peft_loop(module: Watched, config: LoraConfig) -> tuple[list[float], PeftModel]:
    """DPO of the same pairs, in the same order, by peft and torch alone."""
    model = get_peft_model(base_of(module), config)
    own = {name.removeprefix("base_model.model."): weight for name, weight in model.named_parameters()}
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(module.start[name])
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=BETAS, weight_decay=0.0)
    losses = []
    for rows in module.rows:
        pairs = [module.data.splits["train"].pairs[row] for row in rows]
        with torch.no_grad(), model.disable_adapter():
            before = reference_log_probs(model, pairs)
        chosen, rejected = (reference_log_probs(model, pairs) - before).chunk(2)
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "is_tied"), [(["lm_head"], True), (EMBEDDINGS, False), (["mlp", "model.norm"], False)]
)
def test_losses_and_weights_are_those_of_peft_s_own_loop(
    names: list[str], is_tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "llama", ARCHITECTURES["llama"] | {"tie_word_embeddings": is_tied})
    module = run(lora(*names))
    expected, adapted = peft_loop(module, lora(*names))
    assert len(module.losses) == STEPS
    assert module.losses == pytest.approx(expected, abs=1e-6)  # what is logged is float32
    assert abs(module.losses[-1] - module.losses[0]) > 1e-2
    theirs = {name.removeprefix("base_model.model."): weight for name, weight in adapted.named_parameters()}
    ours = dict(module.trained_policy.model.named_parameters())
    assert {name for name, weight in ours.items() if weight.requires_grad} == {
        name for name, weight in theirs.items() if weight.requires_grad
    }
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-5)
        assert torch.equal(weight, module.start[name]) == (not weight.requires_grad), name


def test_the_reference_is_the_base_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "llama", ARCHITECTURES["llama"] | {"tie_word_embeddings": True})
    module = run(lora("lm_head", "model.norm"), dtype="float32")
    base, model, pairs = base_of(module), module.trained_policy.model, random_pairs(4)
    with torch.no_grad():
        trained = reference_log_probs(model, pairs)
        with adapters_disabled(model):
            assert torch.equal(reference_log_probs(model, pairs), reference_log_probs(base, pairs))
        assert torch.equal(reference_log_probs(model, pairs), trained)
    assert largest_difference(trained, reference_log_probs(base, pairs)) > 1e-2
    kept = module.reference["train"]
    again = module.sequence_log_probs_of("train", range(len(kept)))
    assert torch.equal(again.to(kept), kept)
    plain = plain_state(model)
    assert set(plain) == set(base.state_dict())
    assert all(torch.equal(weight, base.state_dict()[name]) for name, weight in plain.items())
    assert hash_weights(plain) == hash_weights(base.state_dict())


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], EMBEDDINGS, ["self_attn", "norm"], ["layers.1"]])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_merged_saved_and_read_again_the_model_computes_what_it_did(
    family: str, names: list[str], is_tied: bool, tmp_path: Path
) -> None:
    other = {"embed_tokens": "embed_in", "self_attn": "attention", "norm": "final_layer_norm"}
    names = [other.get(name, name) for name in names] if family == "gpt_neox" else names
    plain, pairs = make_model(family, torch.float64, tie_word_embeddings=is_tied).eval(), random_pairs(4)
    model, fresh = copy.deepcopy(plain), copy.deepcopy(plain)
    add_lora(model, lora(*names))
    insert_adapters(fresh, lora(*names))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if is_trained(name):
                weight.add_(0.1 * torch.randn_like(weight))
        fresh.save_pretrained(tmp_path / "merged", state_dict=merged_state(fresh, model.state_dict()))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
        model.save_pretrained(tmp_path / "adapter")
        adapted = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter")
        after = reference_log_probs(model, pairs)
        assert largest_difference(after, reference_log_probs(plain, pairs)) > 1e-1
        assert largest_difference(after, reference_log_probs(merged, pairs)) < 1e-10
        assert largest_difference(after, reference_log_probs(adapted, pairs)) < 1e-10
    assert set(merged.state_dict()) == set(plain.state_dict())
    untied = {"embed_tokens", "embed_in", "lm_head"} & set(names)
    is_one = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert is_one == merged.config.tie_word_embeddings == (is_tied and not untied)


@pytest.mark.slow
def test_checkpoints_hold_what_is_trained_and_belong_to_these_modules(tmp_path: Path) -> None:
    first = run(lora(*EMBEDDINGS), max_steps=2)
    first.trainer.save_checkpoint(tmp_path / "two.ckpt")
    kept = torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]
    assert all(is_trained(name) for name in kept)
    assert sum(".modules_to_save." in name for name in kept) == 2
    with pytest.raises(UserError, match="holds the weights of other adapters"):
        run(lora("lm_head"), ckpt_path=str(tmp_path / "two.ckpt"))


def test_whole_modules_keep_their_dtype_beside_float32_adapters() -> None:
    module = run(lora("lm_head"), dtype="bfloat16", max_steps=2)
    trained = {name: w.dtype for name, w in module.trained_policy.model.named_parameters() if w.requires_grad}
    assert {dtype for name, dtype in trained.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in trained.items() if "lora_" not in name} == {torch.bfloat16}
    assert all(torch.isfinite(torch.tensor(module.losses)))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nothing"], "modules_to_save: nothing is no module of LlamaForCausalLM; expected names such as lm_head"),
        (["act_fn"], "modules_to_save: model.layers.0.mlp.act_fn has no weights to train"),
        (["layers.1", "layers.1.mlp"], "modules_to_save: model.layers.1 has adapters or modules inside"),
        (["proj"], "lora: modules_to_save cannot be applied to modules of type"),
    ],
)
def test_what_cannot_be_trained_whole_is_one_line(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        add_lora(make_model("llama"), lora(*names))
    assert "\n" not in str(caught.value)
    with torch.device("meta"):
        empty = make_model("llama")
    with pytest.raises(UserError, match=re.escape(message)):
        why_not_merged(empty, lora(*names))


def test_quantized_weights_cannot_be_trained_whole() -> None:
    model = make_model("llama")
    for block in model.model.layers:
        block.mlp.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"lora: .*: quantized weights can't be trained whole, modules_to_save takes"):
        insert_adapters(model, lora("mlp"))


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["mlp"]])
def test_a_merge_is_tried_without_weights(names: list[str]) -> None:
    config = lora(*names)
    with torch.device("meta"):
        empty = make_model("llama", tie_word_embeddings=True)
    assert why_not_merged(empty, config) is None
    assert config.modules_to_save == names
