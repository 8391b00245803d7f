"""LoRA from the command line: what the run folder holds, and resuming."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.cli import TINY, metrics_of, only_run, run_train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
LORA = (*TINY, "adapter=lora", "module.lora.r=4", "logger=csv", "callbacks=none", "module.schedule=constant")
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
    whole = run_train(*LORA, *LONG, f"runs_root={tmp_path}")
    resumed = run_train(*LORA, *LONG, f"runs_root={root}", "ckpt_path=last")
    assert resumed.returncode == whole.returncode == 0, resumed.stderr + whole.stderr
    rows = [[r for r in metrics_of(only_run(folder)) if r["train/loss"]] for folder in (root, tmp_path)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == ["0", "1", "2", "3"]
    assert [row["train/loss"] for row in rows[0]] == [row["train/loss"] for row in rows[1]]


def test_full_fine_tuning_finds_the_reference_that_lora_left(runs: tuple[Path, str]) -> None:
    root, said = runs
    assert "0 pairs found" in said
    full = [option for option in LORA if "lora" not in option]
    done = run_train(*full, *SHORT, f"runs_root={root}", "name=full")
    assert done.returncode == 0, done.stderr
    assert " 0 computed (train)" in done.stdout


def test_options_that_do_not_go_together_are_one_line(tmp_path: Path) -> None:
    for option, message in (
        ("module.lora.lora_dropout=0.1", "module.lora.lora_dropout: expected 0.0, got 0.1"),
        ("module.freeze_embeddings=false", "module.freeze_embeddings=false: with module.lora only adapters"),
        ("module.lora.rank=4", "did you mean"),
    ):
        done = run_train(*LORA, option, f"runs_root={tmp_path}")
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
