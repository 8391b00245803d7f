"""LoRA from the command line: what the run folder holds, and resuming."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from analysis.open.checkpoints import checkpoints_of_run
from analysis.open.runs import open_run
from launch.training import train
from tests.analysis.asked import save_model
from tests.cli import TINY, composed, logged, metrics_of, only_run, run_train
from tests.processes import run_script
from tiltmeter.steering.intervene import Intervention, steer
from tiltmeter.steering.vector import load_vectors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
LORA = (*TINY, "adapter=lora", "module.lora.r=4", "logger=csv", "callbacks=none", "module.schedule=constant")
VECTOR = (*TINY, "arm=constant_vector", "logger=csv", "callbacks=geometry", "module.schedule=constant")
SHORT = ("trainer.max_steps=2", "trainer.val_check_interval=1")
LONG = ("trainer.max_steps=4", "trainer.val_check_interval=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("runs")
    done = run_train(*LORA, *SHORT, f"runs_root={root}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return root, done.stdout


def test_aligned_is_a_plain_model_and_adapter_gives_the_same_on_the_base(runs: tuple[Path, str]) -> None:
    run = only_run(runs[0])
    base, merged = (AutoModelForCausalLM.from_pretrained(run / name) for name in ("base", "aligned"))
    assert not any("lora" in name for name in merged.state_dict())
    ids = torch.arange(3, 40)[None]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run / "base"), run / "adapter")
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (base, merged, adapted)]
    torch.testing.assert_close(logits[1], logits[2], rtol=0, atol=1e-5)
    assert (logits[1] - logits[0]).abs().max() > 1e-5


def test_checkpoints_hold_adapters_only(runs: tuple[Path, str]) -> None:
    kept = torch.load(only_run(runs[0]) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert kept
    assert all("lora_" in name for name in kept)


def test_a_resumed_run_takes_its_reference_from_the_base_and_ends_where_a_whole_one_does(
    runs: tuple[Path, str], tmp_path: Path
) -> None:
    root, _ = runs
    shutil.copytree(root / "cache" / "bases", tmp_path / "cache" / "bases")  # the base alone, not the reference
    whole = run_train(*LORA, *LONG, f"runs_root={tmp_path}")
    resumed = run_train(*LORA, *LONG, f"runs_root={root}", "ckpt_path=last")
    assert resumed.returncode == whole.returncode == 0, resumed.stderr + whole.stderr
    rows = [[r for r in metrics_of(only_run(folder)) if r["train/loss"]] for folder in (root, tmp_path)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == ["0", "1", "2", "3"]
    assert [row["train/loss"] for row in rows[0]] == [row["train/loss"] for row in rows[1]]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # peft's, of what is read here
def test_modules_trained_whole_from_training_to_report(runs: tuple[Path, str], tmp_path: Path) -> None:
    root = tmp_path / "runs"
    shutil.copytree(runs[0] / "cache", root / "cache")
    whole = (*LORA, "module.lora.modules_to_save=[lm_head,model.norm]", f"runs_root={root}")
    done = run_train(*whole, *SHORT)
    assert (done.returncode, done.stderr) == (0, "")
    run = only_run(root)
    base, merged = (AutoModelForCausalLM.from_pretrained(run / name) for name in ("base", "aligned"))
    assert set(merged.state_dict()) == set(base.state_dict())
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run / "base"), run / "adapter")
    ids = torch.arange(3, 40)[None]
    opened = checkpoints_of_run(open_run(run))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(opened.aligned.model(ids).logits, adapted(ids).logits, rtol=0, atol=1e-5)
    for name in ("lm_head.weight", "model.norm.weight"):
        assert not torch.equal(merged.state_dict()[name], base.state_dict()[name])
    resumed = run_train(*whole, *LONG, "ckpt_path=last")
    assert resumed.returncode == 0, resumed.stderr
    unbroken = run_train(*whole, *LONG, "name=unbroken")
    assert unbroken.returncode == 0, unbroken.stderr
    assert logged(run, "train/loss") == logged(only_run(root, "unbroken"), "train/loss")
    asked = run_script("analyze.py", f"run={run}", "analysis=training")
    assert asked.returncode == 0, asked.stderr


def test_full_fine_tuning_finds_the_reference_that_lora_left(runs: tuple[Path, str]) -> None:
    root, said = runs
    assert "0 pairs found" in said
    full = [option for option in LORA if "lora" not in option]
    done = run_train(*full, *SHORT, f"runs_root={root}", "name=full")
    assert done.returncode == 0, done.stderr
    assert " 0 computed (train)" in done.stdout


def test_options_that_do_not_go_together_are_one_line(tmp_path: Path) -> None:
    for option, message in (
        ("module.freeze_embeddings=false", "module.freeze_embeddings=false: with module.lora only adapters"),
        ("module.lora.rank=4", "did you mean"),
    ):
        done = run_train(*LORA, option, f"runs_root={tmp_path}")
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def of_vector(runs: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that trained a vector, on the base that is there already."""
    root = tmp_path_factory.mktemp("vector")
    shutil.copytree(runs[0] / "cache", root / "cache")
    done = run_train(*VECTOR, *SHORT, f"runs_root={root}")
    assert done.returncode == 0, done.stderr
    return root, done.stdout


def test_trained_vector_is_the_result_and_opens_as_the_aligned_model(of_vector: tuple[Path, str]) -> None:
    root, said = of_vector
    run = only_run(root)
    assert "Adapter: adapter/ is the result, without aligned/: a vector is added to hidden states" in " ".join(
        said.split()
    )
    assert not (run / "aligned").exists()
    (vector,) = load_vectors(run / "adapter" / "vector.safetensors").values()
    assert vector.id.kind == "trained"
    assert vector.norm() > 0
    opened = checkpoints_of_run(open_run(run))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        base, aligned = (one.model(ids).logits for one in (opened.base, opened.aligned))
        with steer(opened.base.model, Intervention(vector.site, vector.values[None])):
            expected = opened.base.model(ids).logits
    torch.testing.assert_close(aligned, expected, rtol=0, atol=1e-5)
    assert (aligned - base).abs().max() > 1e-4
    kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert list(kept) == ["policy.model.trained_vector.d"]


def test_a_resumed_vector_ends_where_a_whole_one_does(of_vector: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(of_vector[0] / "cache", tmp_path / "cache")
    whole = run_train(*VECTOR, *LONG, f"runs_root={tmp_path}")
    resumed = run_train(*VECTOR, *LONG, f"runs_root={of_vector[0]}", "ckpt_path=last")
    assert resumed.returncode == whole.returncode == 0, resumed.stderr + whole.stderr
    losses = [
        [r["train/loss"] for r in metrics_of(only_run(root)) if r["train/loss"]] for root in (of_vector[0], tmp_path)
    ]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


def test_where_adapters_cannot_be_merged_they_are_the_result_and_the_run_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def endless(*_arguments: Any, **_options: Any) -> None:
        raise RecursionError("maximum recursion depth exceeded")

    for name in ("tiltmeter.models.lora._merge_in_place", "peft.tuners.lora.Linear.merge"):
        monkeypatch.setattr(name, endless)
    said = "\n\nHuman: Hi {}\n\nAssistant: {}."
    rows = [json.dumps({"chosen": said.format(i, "yes"), "rejected": said.format(i, "no")}) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    toy = save_model(tmp_path / "toy", seed=0)
    options = (
        "trainer=cpu",
        "adapter=lora",
        "callbacks=none",
        "logger=csv",
        "trainer.max_steps=1",
        "datamodule.val_pairs=4",
    )
    sizes = (
        "datamodule.probe_pairs=8",
        "datamodule.pairs_per_step=4",
        "datamodule.max_length=128",
        "module.learning_rate=1e-2",
    )
    places = (f"model.name_or_path={toy}", f"data.path={tmp_path / 'rows.jsonl'}", f"runs_root={tmp_path / 'runs'}")
    train(composed("experiment=pretrained_hh", *options, *sizes, *places))
    printed = " ".join(capsys.readouterr().out.split())
    for tense in ("will be", "is"):
        assert f"Adapter: adapter/ {tense} the result, without aligned/: " in printed
    run = only_run(tmp_path / "runs", "pretrained_hh")
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert not (run / "aligned").exists()
    opened = checkpoints_of_run(open_run(run))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run / "base"), run / "adapter")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, base = (model(input_ids=ids).logits for model in (opened.aligned.model, opened.base.model))
        torch.testing.assert_close(ours, adapted(input_ids=ids).logits, rtol=0, atol=1e-6)
    assert not torch.equal(ours, base)
