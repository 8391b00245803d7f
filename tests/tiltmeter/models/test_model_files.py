"""Folders that are no model, or half of one: one line each that says what is wrong and what to do, in training and in analysis."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from analysis.open.models import load_model
from tests.analysis.asked import save_model
from tiltmeter.errors import UserError
from tiltmeter.models import model_files
from tiltmeter.models.causal_lm import CausalLM


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("my models") / "a=b", seed=0)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "it's"))


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        raw = json.loads(path.read_text("utf-8")) | changes
        path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}), encoding="utf-8")

    return change


def without(*patterns: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for path in [path for pattern in patterns for path in folder.glob(pattern)]:
            path.unlink()

    return remove


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def half_a_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type"', encoding="utf-8")


def half_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")


def a_run(folder: Path) -> None:
    for name in ("base", "aligned"):
        shutil.copytree(folder, folder.parent / name)
    for path in folder.iterdir():
        path.unlink()
    for name in ("base", "aligned"):
        (folder.parent / name).rename(folder / name)


REMOTE = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without("config.json"), r"no config\.json in it, so no model \(expected what save_pretrained writes\); choose another"),
        (a_run, r"no config\.json in it, .*; give the one inside, .*/it's/aligned$"),
        (half_a_config, r"config\.json: damaged \(.*\); restore it$"),
        (configured(model_type=None), r"config\.json names no model_type; take"),
        (configured(model_type="llama9"), r"transformers \d\S* knows no model_type llama9; choose another"),
        (configured(model_type="my_llama", auto_map=REMOTE), r"my_llama needs Python code .* never run here; choose"),
        (configured(model_type="t5"), r"t5 is no causal language model; choose"),
        (configured(hidden_size=48), r"its weights have other shapes than config\.json says; take both from one model"),
        (configured(num_hidden_layers=3), r"9 weights are missing, model\.layers\.2\.\S+ among them; restore it"),
        (configured(num_attention_heads=5), r"hidden size \(32\) is not a multiple .*; restore it"),
        (without("*token*"), r"it has no tokenizer \(expected tokenizer\.json or the like\); copy that of the model"),
        (half_a_tokenizer, r"Expecting property name .*; restore it"),
        (without("*.safetensors"), r"no weights as safetensors \(expected model\.safetensors\); copy them into it"),
        (pickled, r"no weights as safetensors but pickled ones, .*; convert them once, if you trust them: python -c "),
    ],
)  # fmt: skip
def test_incomplete_model_folder_is_refused_in_one_line(
    folder: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(folder)
    for open_it in (open_for_training, load_model):
        with pytest.raises(UserError) as caught:
            open_it(folder)
        said = str(caught.value)
        assert re.search(words, said), said
        assert str(folder) in said
        assert "\n" not in said
        assert "issue" not in said


def open_for_training(folder: Path) -> None:
    model = CausalLM(str(folder))
    tokenizer = model.load_tokenizer()
    model.load_config(tokenizer)
    model.build(tokenizer)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_no_model_and_the_line_says_how_to_use_it(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(good), LoraConfig()).save_pretrained(folder)
    for open_it in (open_for_training, load_model):
        with pytest.raises(UserError, match="an adapter, expected a whole model; go on from it with") as caught:
            open_it(folder)
        assert {f'model.name_or_path="{good}"', f'base="{good}"', f"aligned={folder}"} <= set(
            shlex.split(str(caught.value))
        )


def test_advised_command_converts_pickled_weights(folder: Path) -> None:
    pickled(folder)
    with pytest.raises(UserError) as caught:
        open_for_training(folder)
    program, option, code = shlex.split(str(caught.value).rpartition("if you trust them: ")[2])
    assert (program, option) == ("python", "-c")
    exec(code)
    open_for_training(folder)


def test_a_tokenizer_may_lie_in_a_folder_of_its_own(folder: Path) -> None:
    without("config.json", "*.safetensors")(folder)
    assert CausalLM("org/model", tokenizer=str(folder)).load_tokenizer().pad_token
    without("*token*")(folder)
    with pytest.raises(UserError, match=r"^model\.tokenizer: cannot load .* it has no tokenizer"):
        CausalLM("org/model", tokenizer=str(folder)).load_tokenizer()


def test_a_model_of_the_hub_is_explained_by_what_was_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configured(model_type="llama9")(folder)
    found = {"config.json": str(folder / "config.json")}
    monkeypatch.setattr(model_files, "cached_file", lambda _, file, **__: found.get(file))
    with pytest.raises(UserError, match=r"cannot load org/model: transformers \S+ knows no model_type llama9"):
        CausalLM("org/model").load_config()
    with pytest.raises(UserError, match=r"org/model: cannot load this model: transformers \S+ knows no model_type"):
        load_model("org/model")
