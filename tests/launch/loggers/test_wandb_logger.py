"""A run folder that goes on is the same run for W&B."""

from pathlib import Path

import pytest

from launch.loggers.wandb_logger import id_of


def test_a_run_folder_keeps_theid_of_its_newest_run(tmp_path: Path) -> None:
    assert id_of(tmp_path) is None
    for name in ("run-20260101_090000-first111", "offline-run-20260102_090000-second22", "latest-run"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    assert id_of(tmp_path) == "second22"


def test_wandb_is_asked_to_go_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    from launch.loggers.wandb_logger import open_wandb

    asked: list[tuple[object, object]] = []

    def init(**options: object) -> None:
        asked.append((options["id"], options["resume"]))
        raise RuntimeError("no server here")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr("launch.loggers.wandb_logger._no_answer", lambda: None)
    (tmp_path / "wandb" / "run-20260101_090000-first111").mkdir(parents=True)
    logger, _ = open_wandb(run_dir=tmp_path, config={}, name="n", group="g", mode="online")
    assert logger is None
    assert asked == [("first111", "allow"), ("first111", None)], "online first, else offline under the same id"
