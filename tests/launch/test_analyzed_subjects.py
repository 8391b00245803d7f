"""What ``python analyze.py`` is asked about may be unfinished, damaged, hostile or not belong together: one line each."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from datamodules.tokenization import train_bpe_tokenizer
from tests.analysis.asked import save_model
from tests.analysis.conftest import CONFIG
from tests.launch.analyze_command import ask, refused
from tests.tiny_models import make_tokenizer

DATA = ("data=synthetic", "data.n_prompts=30", "pairs.n_pairs=5")


def without_aligned(run: Path) -> None:
    (run / "aligned" / "config.json").unlink()


def with_half_a_line(run: Path) -> None:
    text = (run / "metrics.csv").read_text("utf-8")
    (run / "metrics.csv").write_text(text[:-20], encoding="utf-8")


def with_a_sweep_of_nothing(run: Path) -> None:
    (run / "report" / "tables").mkdir(parents=True)
    (run / "report" / "tables" / "sweep.csv").write_text("nonsense\n", encoding="utf-8")


def with_half_a_list_of_prompts(run: Path) -> None:
    (run / "probe_prompts.json").write_text('[{"pair_id": 1', encoding="utf-8")


def with_weights_cut_short(run: Path) -> None:
    file = run / "aligned" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def with_a_manifest_of_nothing(run: Path) -> None:
    (run / "snapshots").mkdir()
    (run / "snapshots" / "manifest.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "analysis", "words"),
    [
        (without_aligned, "all", r"^run: .* has no aligned/ model, so its training did not finish; resume it with"),
        (with_half_a_line, "all", r"metrics\.csv: damaged: line \d+ "),
        (with_a_sweep_of_nothing, "steering_sweep", r"sweep\.json: expected the settings that the sweep was made with"),
        (with_half_a_list_of_prompts, "geometry", r"probe_prompts\.json: expected a list of objects"),
        (with_weights_cut_short, "geometry", r"can’t be read again: .*aligned: cannot load this model"),
        (with_a_manifest_of_nothing, "clouds", r"snapshots: .*manifest\.json: damaged"),
    ],
)  # fmt: skip
def test_a_run_that_is_unfinished_or_damaged(
    tmp_path: Path, run: Path, damage: Callable[[Path], None], analysis: str, words: str
) -> None:
    damage(run)
    assert re.search(words, refused(tmp_path, f"run={run}", f"analysis={analysis}"))


def test_nothing_that_a_run_says_is_run(tmp_path: Path, run: Path) -> None:
    evil = {"_target_": "os.system", "command": f"touch {tmp_path / 'owned'}"}
    nodes = ("data", "module", "model", "logger", "datamodule", "behaviour", "steering", "hidden_states", "pairs")
    config: dict[str, Any] = CONFIG | dict.fromkeys(nodes, evil) | {"callbacks": {"snapshot": evil}}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for name in ("base", "aligned"):
        file = run / name / "config.json"
        raw = json.loads(file.read_text("utf-8")) | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
        file.write_text(json.dumps(raw), encoding="utf-8")
        (run / name / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')", encoding="utf-8")
    assert ask(tmp_path, f"run={run}", "analysis=geometry").is_file()
    assert not (tmp_path / "owned").exists()


def test_two_models_that_do_not_belong_together(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", seed=0)
    wide = save_model(tmp_path / "wide", seed=0, hidden_size=48)
    other = train_bpe_tokenizer(["other words entirely are said here today " * 20], vocab_size=280)
    foreign = save_model(tmp_path / "foreign", seed=1, tokenizer=other)
    gpt2 = save_model(tmp_path / "gpt2", seed=0, family="gpt2")
    heads = save_model(tmp_path / "heads", seed=0, num_key_value_heads=4)
    for aligned, words in (
        (wide, "hidden_size is 32 and 48; give two checkpoints of one model"),
        (gpt2, "model_type is llama and gpt2; give two checkpoints of one model"),
        (heads, "num_key_value_heads is 2 and 4; give two checkpoints of one model"),
        (foreign, "their tokenizers differ; give two checkpoints of one model"),
        (tmp_path / "nowhere", "cannot load this model"),
    ):
        assert words in refused(tmp_path, f"base={base}", f"aligned={aligned}", *DATA)


def test_a_tokenizer_that_cuts_texts_otherwise_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    raw["model"]["merges"] = raw["model"]["merges"][:-5]
    base = save_model(tmp_path / "base", seed=0)
    aligned = save_model(tmp_path / "aligned", seed=1)
    (aligned / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    said = refused(tmp_path, f"base={base}", f"aligned={aligned}", *DATA)
    assert re.search(r"aligned: its tokenizer cuts '.*' into other tokens than the base’s", said)


def test_settings_that_differ_beside_the_weights_are_facts_of_the_page(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", seed=0)
    aligned = save_model(tmp_path / "aligned", seed=1, rms_norm_eps=1e-3)
    text = ask(tmp_path, f"base={base}", f"aligned={aligned}", *DATA, "analysis=geometry").read_text("utf-8")
    assert "their configurations differ: rms_norm_eps 1e-06 and 0.001" in text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_asked_about_with_its_own_base_alone(tmp_path: Path) -> None:
    base, other = (save_model(tmp_path / name, seed=i) for i, name in enumerate(("base", "other")))
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(init_lora_weights="gaussian"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    asked = (f"aligned={tmp_path / 'adapter'}", *DATA, "analysis=geometry")
    assert f"an adapter of {base}, not of {other}" in refused(tmp_path, f"base={other}", *asked)
    text = ask(tmp_path, f"base={base}", *asked).read_text("utf-8")
    assert "adapter against base" in text
