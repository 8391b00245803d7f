"""metrics.csv: every scalar that W&B gets, same names and values, always written."""

import csv
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger


class MetricsCSV(Logger):
    """One row per logging event, one column per metric, beside ``step`` (optimizer step, from 0) and ``epoch``.

    Rows are appended as they come; a new metric rewrites the file with one more column. Going on with a file, rows of steps
    that will be taken again are dropped first, and a row that comes a second time replaces its first, so that nothing
    appears twice.

    Args:
        path: of the file.
        resume_step: optimizer steps taken when the run goes on; None: the first step that is logged.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = path
        self._columns = ["step", "epoch"]
        self._resumes = False
        self._resume_step = resume_step
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file), self._columns)
            self._resumes = True

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.name

    @property
    def version(self) -> str:
        """There is one file a run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row."""
        row = {"step": 0 if step is None else step, **{name: _plain(value) for name, value in metrics.items()}}
        step = int(row["step"])
        new = [name for name in row if name not in self._columns]
        self._columns += new
        if self._resumes:
            self._resume_step = step if self._resume_step is None else self._resume_step
            before = self._resume_step
            self._rewrite(lambda kept: int(kept["step"]) < before)
            self._resumes = False
        elif new:
            self._rewrite(lambda kept: True)
        if self._resume_step is not None and step < self._resume_step and self.path.exists():
            self._rewrite(lambda kept: int(kept["step"]) != step or {k for k, v in kept.items() if v != ""} != set(row))
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    def _rewrite(self, keep: Callable[[dict[str, str]], bool]) -> None:
        rows: list[dict[str, str]] = []
        if self.path.exists():
            whole, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")  # a row cut by a crash is none
            rows = [row for row in csv.DictReader(whole.splitlines()) if keep(row)]
        temporary = self.path.with_suffix(".csv.partial")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)  # noqa: PTH105


def _plain(value: float) -> float | int:
    return value if isinstance(value, int) else float(value)
