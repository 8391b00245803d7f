"""Rows F10 and F11 of the fault list: W&B that is not there, can't be reached, or breaks while it is used."""

import sys
from functools import partial
from pathlib import Path

import pytest

from launch.wandb_logger import Mode, open_wandb
from tests.cli import TINY, logged, only_run, run_train
from tests.faults.faults import broken_wandb


@pytest.mark.parametrize("mode", ["auto", "offline", "online"])
def test_without_the_package_there_is_a_line_and_no_logger(
    mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger, line = open_wandb(run_dir=tmp_path, config={}, name="n", group="g", mode=mode)
    assert logger is None
    assert line.startswith("W&B: not available (")
    assert line.endswith("; metrics.csv has everything")


@pytest.mark.slow
def test_no_server_a_row_that_it_refuses_and_an_end_that_fails_cost_the_run_nothing(tmp_path: Path) -> None:
    run = ("callbacks=none", "logger=wandb", "logger.mode=online", "trainer.max_steps=3", f"runs_root={tmp_path}")
    done = run_train(*TINY, *run, before=partial(broken_wandb, 2))
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    said = done.stdout + done.stderr
    assert list(folder.glob("wandb/offline-run-*")), "kept offline where there is no server"
    assert said.count("W&B stopped taking metrics (broken table); metrics.csv goes on") == 1
    assert said.count("W&B could not finish its run (no network)") == 1
    assert len(logged(folder, "train/loss")) == 3
    assert (folder / "aligned").is_dir()
