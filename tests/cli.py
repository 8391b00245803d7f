"""Runs the command line as a person would, in a process of its own, on a world small enough for a test."""

import csv
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess

from tests.processes import run_script

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
    *arguments: str, timeout: float = 240, environment: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """``python train.py …`` with output captured."""
    return run_script("train.py", *arguments, environment=environment, timeout=timeout)


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
