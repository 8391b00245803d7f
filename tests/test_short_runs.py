"""Options that shorten a run: it ends well, or is refused in a line before anything is trained."""

from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from launch.training import train
from tests.cli import TINY, composed
from tests.test_bad_input import fails_with

SIX_STEPS = (
    *TINY,
    "callbacks=none",
    "logger=csv",
    "data.n_prompts=60",
    "datamodule.val_pairs=8",
    "datamodule.probe_pairs=4",
    "datamodule.pairs_per_step=8",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs find one base."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["trainer.limit_val_batches=0", "trainer.val_check_interval=100"], ["last"]),
        (["datamodule.val_pairs=0", "trainer.val_check_interval=100"], ["last"]),
        (["trainer.max_time=00:00:10:00"], ["best", "last"]),
        (["trainer.check_val_every_n_epoch=5"], []),
        (["trainer.val_check_interval=4", "trainer.max_steps=2"], []),
        (["trainer.val_check_interval=20", "trainer.check_val_every_n_epoch=null"], []),
        (["trainer.val_check_interval='00:01:00:00'"], []),
    ],
)  # fmt: skip
def test_a_shortened_run_ends_with_a_model_and_the_checkpoints_of_its_validations(
    options: list[str], names: list[str], root: Path
) -> None:
    run = train(composed(*SIX_STEPS, f"runs_root={root}", *options))
    GlobalHydra.instance().clear()
    assert (run / "aligned" / "model.safetensors").is_file()
    assert (run / "metrics.csv").is_file()
    assert [path.stem for path in sorted((run / "checkpoints").glob("*.ckpt")) if path.is_symlink()] == names


def test_a_run_without_held_out_pairs_says_so_and_logs_no_figure_of_them(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(composed(*SIX_STEPS, f"runs_root={root}", "datamodule.val_pairs=0", "callbacks=geometry"))
    GlobalHydra.instance().clear()
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "no validation, no held-out metrics, no best checkpoint" in said
    names = (run / "metrics.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert "train/loss" in names
    assert not [name for name in names if name.startswith("val/")]
    assert not (run / "held_out.csv").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["trainer.max_steps=0"], "max_steps=0 and limit_train_batches=1.0 of 6 steps an epoch: expected at least one"),
        (["trainer.max_epochs=0"], "trainer: max_epochs=0,"),
        (["trainer.max_epochs=-1"], "trainer: max_epochs=-1, max_steps=-1"),
        (["trainer.limit_train_batches=0"], "limit_train_batches=0 of 0 steps an epoch"),
        (["trainer.limit_train_batches=0.1"], "limit_train_batches=0.1 of 0 steps an epoch"),
        (["trainer.limit_val_batches=0.1"], "trainer.limit_val_batches=0.1: none of 1 batches"),
        (["trainer.max_time=00:00:00:00"], "trainer.max_time: expected more than no time"),
        (["trainer.val_check_interval=40"], "trainer.val_check_interval=40: an epoch has only 6 steps"),
    ],
)
def test_a_run_that_would_take_no_step_or_validate_never_is_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert words in fails_with(capsys, tmp_path / "r", *SIX_STEPS, *options)
