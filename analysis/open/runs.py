"""Open a finished run folder as DATA: text and numbers are read and checked, nothing in it is imported or instantiated."""

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from tiltmeter.commands import setting
from tiltmeter.errors import UserError

CONFIG_BYTES = 1_000_000
"""Largest config.yaml that is read; real ones have a few kilobytes."""
ADAPTER_FOLDER = "adapter"
"""Folder of what was trained beside a base that stays as it is."""
VECTOR_FILE = "vector.safetensors"
"""File in it of a vector."""
STEERING_FILE = "steering.safetensors"
"""File in it of a steering by sparse features (:mod:`tiltmeter.sparse.steering_file`)."""
SAE_FILE = "sae_weights.safetensors"
"""File in it of a sparse autoencoder, which is trained on the base and is no model."""
_ADAPTER_FILES = ("adapter_config.json", VECTOR_FILE, STEERING_FILE, SAE_FILE)
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)(?:_(\d+))?")
Scalar = str | int | float | bool


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: the run folder.
        config: config.yaml as plain data; ``_target_`` in it is text like any other.
        metrics: metrics.csv; NaN where a metric was not logged.
        held_out: held_out.csv, the last validation with a row a pair; None for runs without it.
    """

    folder: Path
    config: dict[str, Any]
    metrics: pd.DataFrame
    held_out: pd.DataFrame | None = None

    @property
    def base(self) -> Path:
        """The model before training, or a pointer to it."""
        return self.folder / "base"

    @property
    def aligned(self) -> Path:
        """The model after the last step; the adapter of it where that couldn't be merged."""
        return self.folder / ("aligned" if _is_merged(self.folder) else ADAPTER_FOLDER)

    @property
    def base_source(self) -> tuple[str, str | None]:
        """Source of the model before training, and its revision: see :func:`source_of_base`."""
        return source_of_base(self.base)

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.folder / "report"

    @property
    def started(self) -> datetime | None:
        """Start of the run, local time; None for a folder that was renamed."""
        stamp = _read_stamp(self.folder.resolve().name)
        return None if stamp is None else stamp[0]

    @property
    def n_steps(self) -> int:
        """Optimizer steps taken."""
        return int(self.metrics["step"].max()) + 1

    def node(self, path: str) -> dict[str, Any]:
        """The mapping at a dotted path of the configuration; empty when there is none."""
        here: Any = self.config
        for name in path.split("."):
            here = here.get(name) if isinstance(here, dict) else None
        return here if isinstance(here, dict) else {}

    def setting(self, path: str) -> Scalar | None:
        """The value at a dotted path of the configuration; None when there is none or it isn't a single value."""
        parent, _, name = path.rpartition(".")
        value = (self.node(parent) if parent else self.config).get(name)
        return value if isinstance(value, Scalar) else None


def find_run(run: str, runs_root: Path) -> Path:
    """The run folder that ``run=…`` means; ``last`` is the newest finished one below ``runs_root``.

    Raises:
        UserError: there is none.
    """
    if run != "last":
        return Path(run)
    finished = list(finished_runs(runs_root))
    if not finished:
        raise UserError(f"run=last: no finished run below {runs_root}; train one first: python train.py")
    return max(finished, key=start_of)


def source_of_base(folder: Path) -> tuple[str, str | None]:
    """Source of a run's model before training, and its revision: base/ itself, or what it points to.

    Raises:
        UserError: neither; names the file.
    """
    if (folder / "config.json").is_file():
        return str(folder), None
    path = folder / "pointer.json"
    try:
        pointer = json.loads(path.read_text(encoding="utf-8"))
        name, revision = pointer["name"], pointer["revision"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: expected name and revision of the base model ({error}); restore it") from error
    return str(name), None if revision is None else str(revision)


def start_of(folder: Path) -> tuple[datetime, int]:
    """Time at which a run folder was made, and its number among those of the same second; a renamed one comes first."""
    return _read_stamp(folder.name) or (datetime.min, 0)


def finished_runs(runs_root: Path) -> Iterator[Path]:
    """Run folders below a root that have their trained model; bases kept in cache/ are no runs."""
    for folder in runs_root.glob("*/*"):
        if folder.parent.name != "cache" and _read_stamp(folder.name) and is_finished(folder):
            yield folder


def open_run(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        UserError: not a run folder, not finished, or a file of it is missing or damaged; names the file.
    """
    if not folder.is_dir():
        raise UserError(
            f"run: no such folder: {folder} (expected a run folder such as runs/NAME/DATE_TIME, or run=last)"
        )
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run: {folder} has no config.yaml, so it is no run folder{_newest_inside(folder)}")
    if not is_finished(folder):
        raise UserError(
            f"run: {folder} has no aligned/ model, so its training did not finish; resume it with "
            f"{setting('ckpt_path', folder / 'checkpoints' / 'last.ckpt')} and its experiment"
        )
    held_out = folder / "held_out.csv"
    return Run(
        folder,
        read_config(folder / "config.yaml"),
        _read_metrics(folder / "metrics.csv"),
        _read_held_out(held_out) if held_out.exists() else None,
    )


def _read_held_out(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it to go on without confidence intervals") from error
    if not {"pair_id", "prompt"} <= set(table.columns):
        raise UserError(
            f"{path}: expected the columns pair_id and prompt, got {', '.join(table.columns)}; delete or restore it"
        )
    return table


def is_finished(folder: Path) -> bool:
    """aligned/, or adapter/ alone where it can't be merged, is renamed into place as the last thing that training writes."""
    adapter = folder / ADAPTER_FOLDER
    return _is_merged(folder) or any((adapter / name).is_file() for name in _ADAPTER_FILES)


def minutes_of(folder: Path) -> float:
    """Minutes that a finished run took, by its files: from its configuration to its last metric; NaN where one is missing."""
    files = folder / "metrics.csv", folder / "config.yaml"
    if not all(path.is_file() for path in files):
        return math.nan
    seconds = files[0].stat().st_mtime - files[1].stat().st_mtime
    return round(max(seconds, 0.0) / 60, 2)


def _is_merged(folder: Path) -> bool:
    return (folder / "aligned" / "config.json").is_file()


def _read_stamp(name: str) -> tuple[datetime, int] | None:
    match = _STAMP.fullmatch(name)
    if match is None:
        return None
    try:
        return datetime.strptime(match[1], "%Y-%m-%d_%H-%M-%S"), int(match[2] or 1)
    except ValueError:
        return None


def _newest_inside(folder: Path) -> str:
    runs = sorted((path.parent for path in folder.glob("*/config.yaml")), key=start_of)
    return f"; the newest run in it is {runs[-1]}" if runs else " (expected a folder such as runs/NAME/DATE_TIME)"


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.yaml as plain data. Raises UserError."""
    size = path.stat().st_size
    if size > CONFIG_BYTES:
        raise UserError(
            f"{path}: {size} bytes, more than any configuration has ({CONFIG_BYTES}); restore the run's own file"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # the loader's own errors, and KeyError, AttributeError … from hostile tags
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: not a plain YAML file ({reason}); restore the run's own file") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: expected a mapping of settings, got {type(content).__name__}; restore the run's own file"
        )
    return content


def _read_metrics(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise UserError(f"{path}: no such file; without it there is no training to show, restore it or train again")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise _damaged(path, str(error)) from error
    if "step" not in header or len(set(header)) < len(header):
        raise _damaged(path, "its first line must name every column once, step among them")
    if not rows:
        raise _damaged(path, "it has no rows")
    numbers = [_numbers(path, i + 2, row, len(header)) for i, row in enumerate(rows)]
    table = pd.DataFrame(numbers, columns=header)
    steps = table["step"]
    if not ((steps >= 0) & (steps == steps.round()) & (steps < 1e12)).all():
        raise _damaged(path, "column step must hold whole numbers from 0")
    return table.astype({"step": int})


def _numbers(path: Path, line: int, row: list[str], n_columns: int) -> list[float]:
    if len(row) != n_columns:
        raise _damaged(path, f"line {line} has {len(row)} of {n_columns} fields")
    try:
        return [float(text) if text else float("nan") for text in row]
    except ValueError as error:
        raise _damaged(path, f"line {line}: {' '.join(str(error).split())[:80]}") from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: damaged: {reason}; restore it or train again")
