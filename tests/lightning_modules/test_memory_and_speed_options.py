"""Activation checkpointing, compiled blocks and LoRA: options that keep the numbers, alone and together."""

import math
import re
from functools import partialmethod
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.testing import assert_close

from lightning_modules.dpo import DPOModule
from lightning_modules.policy import compile_blocks
from tests.tiny_models import (
    ARCHITECTURES,
    fit,
    largest_difference,
    lightning_warnings,
    make_data,
    make_model,
    random_pairs,
)
from tiltmeter.errors import UserError
from tiltmeter.models.lora import adapters_disabled, add_lora, merged_state
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.pairs.packing import use_packed_attention

pytestmark = lightning_warnings


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8} | options))


def trained(steps: int = 3, precision: str = "32-true", family: str = "llama", **options: Any) -> DPOModule:
    """A module after a few steps; its losses are in ``module.losses``."""
    module = DPOModule(**({"learning_rate": 1e-3, "warmup_share": 0.0, "schedule": "constant"} | options))
    losses: list[float] = []
    step = module.training_step

    def watched(batch: Any, batch_idx: int) -> None:
        step(batch, batch_idx)
        losses.append(float(module.trainer.callback_metrics["train/loss"]))

    module.training_step = watched  # type: ignore[method-assign]
    torch.manual_seed(0)
    data = make_data(12, pairs_per_step=4, tokens_per_micro_batch=150)
    fit(module, data, family=family, dtype="float32", max_steps=steps, precision=precision)
    module.losses = losses  # type: ignore[assignment]
    return module


def weights(module: DPOModule) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.trained_policy.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("precision", "with_lora"), [("32-true", True), ("bf16-mixed", False)])
def test_activation_checkpointing_changes_nothing(precision: str, with_lora: bool) -> None:
    options = {"lora": lora() if with_lora else None, "precision": precision}
    plain, checkpointed = trained(**options), trained(**options, activation_checkpointing=True)
    assert checkpointed.trained_policy.model.is_activation_checkpointing
    assert plain.losses == checkpointed.losses
    assert_close(weights(plain), weights(checkpointed), rtol=0, atol=0)


def test_activation_checkpointing_keeps_fewer_tensors() -> None:
    kept = {}
    for checkpointing in (False, True):
        module = trained(steps=1, activation_checkpointing=checkpointing)
        sizes: list[int] = []
        batch = next(iter(module.data.loader("train"))).micro_batches[0]
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            module.trained_policy.train()(batch)
        kept[checkpointing] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


compiling = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning",
)


@pytest.mark.slow
@compiling
def test_blocks_of_the_default_backend_compute_what_plain_ones_do() -> None:
    """Forward and backward once: of a whole run's graphs, those that are trained, since the C++ takes most of the time."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (make_model("llama", num_hidden_layers=1) for _ in range(2))
    batch = collate_pairs(random_pairs(4), pair_index=range(4), packed=True)
    compile_blocks(compiled)
    found = []
    with inductor.patch(
        compile_threads=1
    ):  # else a pool of processes is started, each with the libraries, for one block
        for model in (plain, compiled):
            use_packed_attention(model)
            logps = sequence_log_probs(model, batch)
            logps.sum().backward()
            found.append((logps.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] > 0, "not compiled"
    (expected, theirs), (logps, ours) = found
    assert ((logps - expected).abs() / (1 + expected.abs())).max() < 1e-5
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, rtol=0, atol=1e-5 * max(1.0, float(gradient.abs().max())), msg=name)


@pytest.mark.slow
@compiling
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": True, "activation_checkpointing": True},
        {"lora": True, "activation_checkpointing": True, "precision": "bf16-mixed"},
    ],
    ids=["plain", "lora, checkpointed", "lora, checkpointed, bf16-mixed"],
)
def test_compiled_blocks_train_as_plain_ones_do(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The default backend's graphs, without its C++."""
    torch._dynamo.reset()
    monkeypatch.setitem(ARCHITECTURES, "llama", ARCHITECTURES["llama"] | {"num_hidden_layers": 1})
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    if options.get("lora"):
        options = options | {"lora": lora()}
    tolerance = 2e-2 if options.get("precision") else 1e-5
    plain, compiled = trained(**options), trained(**options, compile_blocks=True)
    assert compiled.losses[0] == pytest.approx(math.log(2), abs=1e-3 if options.get("precision") else 1e-6)
    assert compiled.losses == pytest.approx(plain.losses, rel=tolerance)
    assert_close(
        weights(compiled), weights(plain), rtol=0, atol=3 * 1e-3 * 1.01, msg="at most lr a step, whatever rounding"
    )
    scale = 1 + plain.reference["train"].abs()
    assert ((compiled.reference["train"] - plain.reference["train"]).abs() / scale).max() < tolerance


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(UserError, match=r"module.compile_blocks: no C\+\+ compiler was found"):
        trained(compile_blocks=True)


@pytest.mark.parametrize(("precision", "family"), [("32-true", "gpt2"), ("bf16-mixed", "llama")])
def test_lora_starts_at_ln_2_and_moves_its_adapters_alone(family: str, precision: str) -> None:
    module = trained(family=family, lora=lora(), precision=precision)
    assert module.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert module.losses[-1] != module.losses[0]
    model = module.trained_policy.model
    assert {name.split(".")[-3] for name in weights(module)} == {"lora_A", "lora_B"}
    base = dict(trained(steps=1, family=family, learning_rate=1e-30).trained_policy.model.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert_close(parameter, base[name.replace("base_layer.", "")], rtol=0, atol=1e-20)


def test_without_its_adapters_a_trained_model_is_the_reference() -> None:
    module = trained(lora=lora())
    before = module.reference["train"].clone()
    assert_close(module.sequence_log_probs_of("train", range(12)), before, rtol=0, atol=1e-5)
    batch = next(iter(module.data.loader("train"))).micro_batches[0]
    with torch.no_grad():
        adapted = module.trained_policy(batch)
        with pytest.raises(RuntimeError, match="inside"), adapters_disabled(module.trained_policy.model):
            raise RuntimeError("inside")
        assert torch.equal(module.trained_policy(batch), adapted), "back on after an exception"
    assert all(parameter.requires_grad for name, parameter in module.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}]
)
def test_merged_weights_compute_what_the_adapted_model_does(options: dict[str, Any]) -> None:
    model, fresh = make_model("llama", torch.float64), make_model("llama", torch.float64, seed=1)
    plain_names = set(model.state_dict())
    for made in (model, fresh):
        add_lora(made, lora(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    batch = collate_pairs(random_pairs(4), pair_index=range(4))
    adapted = sequence_log_probs(model, batch)
    state = merged_state(fresh, model.state_dict())
    assert set(state) == plain_names
    merged = make_model("llama", torch.float64, seed=2)
    merged.load_state_dict(state)
    assert largest_difference(adapted, sequence_log_probs(merged, batch)) < 1e-4
    with adapters_disabled(model):
        assert largest_difference(adapted, sequence_log_probs(model, batch)) > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": False}, "init_lora_weights: expected True, got False"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected True, got pissa"),
        ({"bias": "all"}, "bias: expected none, got all"),
        (
            {"modules_to_save": "lm_head"},
            "modules_to_save: expected a list of modules such as [lm_head], got 'lm_head'",
        ),
        ({"ensure_weight_tying": True}, "ensure_weight_tying: expected False, got True"),
    ],
)
def test_lora_options_under_which_the_start_would_not_be_the_reference_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        DPOModule(learning_rate=1e-3, lora=lora(**options))


def test_lora_refuses_what_it_cannot_train() -> None:
    with pytest.raises(UserError, match=r"freeze_embeddings=false: with lora only adapters are trained"):
        DPOModule(learning_rate=1e-3, lora=lora(), freeze_embeddings=False)
    with pytest.raises(UserError, match=r"target_modules: lm_head is no part of the decoder"):
        add_lora(make_model("llama", tie_word_embeddings=False), lora(target_modules=["lm_head"]))
    with pytest.raises(UserError, match=r"lora: .*nothing_like_it"):
        add_lora(make_model("llama"), lora(target_modules=["nothing_like_it"]))


def test_adapters_of_16_bit_weights_are_float32() -> None:
    model = make_model("llama", torch.bfloat16)
    add_lora(model, lora())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16


def test_the_reference_pass_leaves_the_random_numbers_alone() -> None:
    module = DPOModule(learning_rate=1e-3)
    states: list[Tensor] = []
    whole = module.on_fit_start

    def watched() -> None:
        states.append(torch.get_rng_state())
        whole()
        states.append(torch.get_rng_state())

    module.on_fit_start = watched  # type: ignore[method-assign]
    fit(module, make_data(8, pairs_per_step=4), family="llama", dtype="float32", max_steps=1)
    assert torch.equal(*states)
    assert not module.reference["train"][:4].isnan().all()
