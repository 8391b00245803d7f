"""What W&B gets of hidden states beside scalars, read back from the offline file."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file

from analysis.figures.fig3_consistency import EDGES, OF_PAIRS
from analysis.registry import ANALYSES
from launch.loggers.metrics_csv import MetricsCSV
from launch.loggers.wandb_logger import RunLogger, close_wandb, open_wandb
from launch.loggers.wandb_media import WandbMedia
from tests.analysis import planted_geometry as planted
from tests.wandb_file import history_rows, metric_definitions, read_records, wait_until_written

NO_MODULE = cast(LightningModule, None)


def trainer_at(step: int) -> Trainer:
    return cast(Trainer, SimpleNamespace(global_step=step))


@pytest.fixture
def logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunLogger]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    opened, line = open_wandb(run_dir=tmp_path, config={}, name="run", group="test")
    assert opened is not None, line
    yield opened
    close_wandb(opened)


def train(logger: RunLogger, run_dir: Path, *, shifts: tuple[float, ...] = (0.1, 0.4)) -> WandbMedia:
    """The calls that a training with an observation every five steps makes."""
    media, csv = WandbMedia(logger, run_dir), MetricsCSV(run_dir / "metrics.csv")
    rows = planted.geometry_rows(shifts=shifts)
    for step in range(1, 5 * len(shifts) + 1):
        for row in (
            row for row in rows if row["probe/steps_taken"] == step or (step == 1 and row["probe/steps_taken"] == 0)
        ):
            figures = {name: value for name, value in row.items() if name != "step"}
            csv.log_metrics(figures, step=int(row["step"]))
            logger.log_metrics(figures, step=int(row["step"]))
        media.on_train_batch_end(trainer_at(step), NO_MODULE, None, None, 0)
    media.on_train_epoch_end(trainer_at(step), NO_MODULE)
    return media


def add_vectors(run_dir: Path) -> None:
    (run_dir / "vectors").mkdir()
    save_file({"layer_00": torch.ones(4)}, run_dir / "vectors" / "steering.safetensors", metadata={"steps_taken": "10"})


def wandb_file(run_dir: Path) -> Path:
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    wait_until_written(file)
    return file


def test_figures_histograms_and_artifacts_arrive(logger: RunLogger, tmp_path: Path) -> None:
    planted.write_snapshots(tmp_path / "snapshots")
    add_vectors(tmp_path)
    media = train(logger, tmp_path)
    media.on_train_end(trainer_at(10), NO_MODULE)
    close_wandb(logger)
    file = wandb_file(tmp_path)
    rows = [row for row in history_rows(file) if any(name.startswith("figures/") for name in row)]
    assert [row["trainer/global_step"] for row in rows] == [4, 9], "once an observation"
    for row in rows:
        for name in (a.name for a in ANALYSES if a.while_training):
            assert row[f"figures/{name}/_type"] == "image-file"
            assert (file.parent / "files" / row[f"figures/{name}/path"]).stat().st_size < 200_000
            assert row[f"figures/{name}/caption"]
        for side in OF_PAIRS:
            name = f"cosines/{side}/final_post_norm"
            assert row[f"{name}/_type"] == "histogram"
            assert len(row[f"{name}/bins"]) == len(EDGES)
            assert sum(row[f"{name}/values"]) == pytest.approx(planted.N_PAIRS)
    artifacts = {r.artifact.type: r.artifact for r in read_records(file) if r.WhichOneof("record_type") == "artifact"}
    assert set(artifacts) == {"snapshot-manifest", "steering-vectors"}
    contents = [entry.path for artifact in artifacts.values() for entry in artifact.manifest.contents]
    assert sorted(contents) == ["manifest.json", "steering.safetensors"], "no rows"
    assert '"steps_taken": "10"' in artifacts["steering-vectors"].metadata.replace('":"', '": "')


def test_every_family_of_names_has_the_step_axis(logger: RunLogger, tmp_path: Path) -> None:
    close_wandb(logger)
    axes = metric_definitions(wandb_file(tmp_path))
    families = {name.split("/")[0] for row in planted.geometry_rows() for name in row if "/" in name}
    for family in families | {"figures", "cosines", "alarm", "gradient"}:
        assert axes[f"{family}/*"] == "trainer/global_step", family
    hidden = {
        r.metric.glob_name
        for r in read_records(wandb_file(tmp_path))
        if r.WhichOneof("record_type") == "metric" and r.metric.options.hidden
    }
    assert "effective_rank/*" in hidden
    assert "shift_share/*" not in hidden


def test_a_run_without_snapshots_or_vectors_sends_what_there_is(logger: RunLogger, tmp_path: Path) -> None:
    media = train(logger, tmp_path, shifts=(0.3,))
    media.on_train_end(trainer_at(5), NO_MODULE)
    close_wandb(logger)
    names = {name for row in history_rows(wandb_file(tmp_path)) for name in row}
    assert "figures/geometry/path" in names
    assert not [name for name in names if name.startswith(("figures/cosines", "cosines/"))]
    assert not [r for r in read_records(wandb_file(tmp_path)) if r.WhichOneof("record_type") == "artifact"]


def test_nothing_observed_is_nothing_drawn(logger: RunLogger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WandbMedia, "_send_figures", lambda *_: pytest.fail("drawn"))
    media = WandbMedia(logger, tmp_path)
    logger.log_metrics({"train/loss": 0.5, "alarm/nan": 0.0, "probe/steps_taken": 1}, step=0)
    media.on_train_batch_end(trainer_at(1), NO_MODULE, None, None, 0)


class Broken:
    """A W&B run that takes nothing."""

    id = "x"

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("disk quota")


def test_a_failure_is_reported_once_and_stops_nothing(tmp_path: Path) -> None:
    logger = RunLogger.__new__(RunLogger)
    logger._experiment = Broken()  # type: ignore[assignment]
    planted.write_snapshots(tmp_path / "snapshots")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        media = train(logger, tmp_path)
        media.on_train_end(trainer_at(10), NO_MODULE)
    said = [str(warning.message) for warning in caught]
    assert len([line for line in said if "no figures or artifacts" in line]) == 1, said
    assert len([line for line in said if "stopped taking metrics" in line]) == 1, said


def test_a_picture_that_cannot_be_drawn_leaves_scalars_alone(logger: RunLogger, tmp_path: Path) -> None:
    planted.write_snapshots(tmp_path / "snapshots")
    (tmp_path / "snapshots" / "epoch=001.safetensors").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="no figures or artifacts .*epoch=001"):
        train(logger, tmp_path)
    close_wandb(logger)
    assert any("shift_share/delta/layer_00" in row for row in history_rows(wandb_file(tmp_path)))
