"""A LoRA adapter as aligned=…: the model that peft makes of it, or one line on why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from analysis.open.adapters import CONFIG, WEIGHTS, find_adapter
from analysis.open.checkpoints import Checkpoints, HeldOutPairs
from tests.analysis.asked import save_model
from tests.tiny_models import MemorySource
from tiltmeter.errors import UserError
from tiltmeter.models.lora import is_trained

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "base", seed=0)


def write_adapter(folder: Path, base: Path, **options: Any) -> Path:
    """An adapter whose weights are all random, as peft saves it."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    for name, weight in adapted.named_parameters():
        if is_trained(name):
            weight.data += 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return write_adapter(base.parent / "adapter", base)


def asked(base: Path, aligned: Path, **options: Any) -> Checkpoints:
    return HeldOutPairs(n_pairs=4).ask(str(base), str(aligned), MemorySource(6), **options)[0]


def change(folder: Path, to: Path, **options: Any) -> Path:
    """A copy of an adapter with other words in its configuration."""
    to.mkdir()
    (to / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    config = json.loads((folder / CONFIG).read_text("utf-8")) | options
    (to / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return to


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head", "model.norm"]},
    ],
)
def test_the_aligned_model_is_what_peft_computes_and_the_base_is_untouched(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    found = asked(base, write_adapter(tmp_path / "adapter", base, **options))
    plain = AutoModelForCausalLM.from_pretrained(base)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    with torch.no_grad():
        ours, theirs = found.aligned.model(IDS).logits, adapted(IDS).logits
        before = plain(IDS).logits
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert torch.equal(found.base.model(IDS).logits, before)
        with adapted.disable_adapter():
            assert torch.equal(adapted(IDS).logits, found.base.model(IDS).logits)
    assert (ours - before).abs().max() > 1e-2
    assert not [name for name, _ in found.aligned.model.named_modules() if "lora" in name]
    assert not found.aligned.model.training


def test_in_bfloat16(base: Path, adapter: Path) -> None:
    found = asked(base, adapter, dtype="bfloat16")
    assert {weight.dtype for weight in found.aligned.model.parameters()} == {torch.bfloat16}


def test_an_adapter_that_names_its_base_is_for_models_of_that_name(base: Path, adapter: Path, tmp_path: Path) -> None:
    for i, name in enumerate(("org/base", None, str(base))):
        asked(base, change(adapter, tmp_path / str(i), base_model_name_or_path=name))
    other = change(adapter, tmp_path / "other", base_model_name_or_path="org/other")
    with pytest.raises(UserError, match=r"adapter_config\.json: an adapter of org/other, not of .*base; give the base"):
        asked(base, other)


def test_an_adapter_of_another_shape(adapter: Path, tmp_path: Path) -> None:
    wide = tmp_path / "base"
    save_model(wide, seed=0, hidden_size=48)
    with pytest.raises(UserError, match=r"adapter: this adapter does not fit its base \(.*size mismatch") as caught:
        asked(wide, adapter)
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_damaged_or_not_all_there(base: Path, adapter: Path, tmp_path: Path) -> None:
    one = change(adapter, tmp_path / "one")
    weights = load_file(one / WEIGHTS)
    for name in (sorted(weights)[0], "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"):
        changed = dict(weights)
        changed[name] = changed.pop(sorted(weights)[0])
        if name in weights:
            del changed[name]
        save_file(changed, one / WEIGHTS)
        with pytest.raises(UserError, match=r"one: this adapter does not fit its base \(it"):
            asked(base, one)
    (one / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(UserError, match="one: this adapter does not fit its base"):
        asked(base, one)
    torch.save(weights, one / "adapter_model.bin")
    (one / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"one: this adapter does not fit its base .*No such file"):
        asked(base, one)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peft_type": "PROMPT_TUNING"}, r"expected a LoRA adapter, got PROMPT_TUNING"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron_config={'a': 1}: not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa: not supported"),
        ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "ensure_weight_tying=True: not supported"),
        ({"modules_to_save": ["lm_head"]}, r"does not fit its base \('base_model.model.lm_head.weight'\)"),
    ],
)
def test_what_is_not_merely_weights_is_refused(
    base: Path, adapter: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        asked(base, change(adapter, tmp_path / "it", **options))


def test_an_adapter_is_no_base(base: Path, adapter: Path) -> None:
    with pytest.raises(UserError, match=r"base=.*: an adapter, expected a whole model"):
        asked(adapter, base)


def test_what_is_no_adapter(base: Path, tmp_path: Path) -> None:
    for where in (str(base), str(tmp_path / "nowhere"), "no/where/at/all", "someone/model"):
        assert find_adapter(where) is None
