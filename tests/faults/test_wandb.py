"""Rows F10 and F11 of the fault list: W&B that is not there, can't be reached, or breaks while it is used."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import wandb

from launch.loggers.wandb_logger import Mode, close_wandb, open_wandb
from tests.cli import TINY, logged, only_run, run_train
from tests.faults.faults import broken_wandb
from tests.tiltmeter.scoring.stub_endpoint import refused_url


@pytest.mark.parametrize("mode", ["auto", "offline", "online"])
def test_without_the_package_there_is_a_line_and_no_logger(
    mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger, line = open_wandb(run_dir=tmp_path, config={}, name="n", group="g", mode=mode)
    assert logger is None
    assert line.startswith("W&B: not available (")
    assert line.endswith("; metrics.csv has everything")


@pytest.mark.parametrize("problem", ["API key is invalid", "Run initialization has timed out after 30.0 sec"])
def test_a_refused_key_or_a_start_that_hangs_is_kept_offline_and_said(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None, float, float]] = []
    start = wandb.init
    monkeypatch.setattr("launch.loggers.wandb_logger._no_answer", lambda: None)

    def refusing(**options: Any) -> Any:
        settings = options["settings"]
        asked.append((options["mode"], options["id"], settings.init_timeout, settings.finish_timeout))
        if options["mode"] == "online":
            (tmp_path / "wandb" / "run-20260101_090000-failed11").mkdir(parents=True)
            raise wandb.errors.CommError(problem)
        return start(**options)

    monkeypatch.setattr(wandb, "init", refusing)
    logger, line = open_wandb(run_dir=tmp_path, config={}, name="n", group="g", mode="online")
    assert logger is not None
    close_wandb(logger)
    limits = (30, 300)  # seconds: neither may take for ever, and the failed start's id is in use for W&B
    assert asked == [("online", None, *limits), ("offline", None, *limits)]
    assert line.startswith(f"W&B: kept offline ({problem}); upload it with: wandb sync ")


@pytest.mark.slow
def test_no_server_a_row_that_it_refuses_and_an_end_that_fails_cost_the_run_nothing(tmp_path: Path) -> None:
    run = ("callbacks=none", "logger=wandb", "trainer.max_steps=3", f"runs_root={tmp_path}")
    logged_in = {"WANDB_API_KEY": 40 * "a", "WANDB_BASE_URL": refused_url(), "WANDB_MODE": None}
    done = run_train(*TINY, *run, before=partial(broken_wandb, 2), environment=logged_in)
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    said = done.stdout + done.stderr
    assert "W&B: kept offline (no answer from http://127.0.0.1:" in said
    assert [path.name[:12] for path in folder.glob("wandb/*run-2*")] == ["offline-run-"], (
        "no start that has to time out"
    )
    assert said.count("W&B stopped taking metrics (broken table); metrics.csv goes on") == 1
    assert said.count("W&B could not finish its run (no network)") == 1
    assert len(logged(folder, "train/loss")) == 3
    assert (folder / "aligned").is_dir()
