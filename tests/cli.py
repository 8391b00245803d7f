"""Runs the command line as a person would, in a process of its own, on a world small enough for a test."""

import csv
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TINY = (
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=2",
    "model.vocab_size=300",
    "data.n_prompts=120",
    "datamodule.val_pairs=20",
    "datamodule.probe_pairs=10",
    "base.max_epochs=1",
    "decoding.max_new_tokens=8",
)


def run_train(
    *arguments: str, timeout: int = 240, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``python train.py …`` with output captured."""
    inherited = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT", "PL_GLOBAL_SEED"):
        inherited.pop(name, None)
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=inherited | (environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def only_run(root: Path, experiment: str = "tiny_synthetic") -> Path:
    """The one run folder below a root."""
    (folder,) = sorted((root / experiment).iterdir())
    return folder


def metrics_of(run: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def logged(run: Path, name: str) -> list[float]:
    """One metric over time, where it was logged."""
    return [float(row[name]) for row in metrics_of(run) if row.get(name)]
