"""metrics.csv: every scalar that W&B gets, same names and values, always written."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger


class MetricsCSV(Logger):
    """One row per logging event, one column per metric, beside ``step`` (optimizer step, from 0) and ``epoch``.

    Rows are appended as they come; a new metric rewrites the file with one more column. On resume, rows from the resumed
    step on are dropped first, so that no step appears twice.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns = ["step", "epoch"]
        self._resumes = False
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
        new = [name for name in row if name not in self._columns]
        if new or self._resumes:
            self._columns += new
            self._rewrite(before_step=int(row["step"]) if self._resumes else None)
            self._resumes = False
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    def _rewrite(self, *, before_step: int | None) -> None:
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        if before_step is not None:
            rows = [row for row in rows if int(row["step"]) < before_step]
        temporary = self.path.with_suffix(".csv.partial")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)  # noqa: PTH105


def _plain(value: float) -> float | int:
    return value if isinstance(value, int) else float(value)
