"""metrics.csv: every scalar that W&B gets, same names and values, always written."""

import csv
import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger

from tiltmeter.errors import FailedWrite
from tiltmeter.files import write_text, writing


class MetricsCSV(Logger):
    """One row per logging event, one column per metric, beside ``step`` (optimizer step, from 0) and ``epoch``.

    Rows are appended as they come; a new metric rewrites the file with one more column. Going on with a file, rows of steps
    that will be taken again are dropped first, and a row that comes a second time replaces its first, so that nothing
    appears twice. A row that can't be written stops nothing: it is kept in memory, and written with the next one that can be.

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
        self.failure: FailedWrite | None = None
        """Why the last row could not be written; None: every row is in the file."""
        self._waiting: list[dict[str, Any]] = []
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
        self._waiting.append(
            {"step": 0 if step is None else step, **{k: _plain(value) for k, value in metrics.items()}}
        )
        self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that wait; what fails is said once and tried again with the next row."""
        try:
            with writing(self.path):
                while self._waiting:
                    self._append(self._waiting[0])
                    del self._waiting[0]
            self.failure = None
        except FailedWrite as error:
            if self.failure is None:
                warnings.warn(f"{error}; its rows are kept in memory and written when there is room", stacklevel=2)
            self.failure = error

    def finish(self) -> None:
        """Write what still waits, at the end.

        Raises:
            FailedWrite: rows are lost.
        """
        self.save()
        if self.failure is not None:
            raise self.failure

    def _append(self, row: dict[str, Any]) -> None:
        self._make_room(row)
        n_bytes = self.path.stat().st_size
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
        except OSError:
            os.truncate(self.path, n_bytes)  # no half rows
            raise

    def _make_room(self, row: dict[str, Any]) -> None:
        """Rewrite the file where the row has new columns, or a resumed run takes its step again."""
        step = int(row["step"])
        columns = [*self._columns, *(name for name in row if name not in self._columns)]
        if self._resumes:
            before = step if self._resume_step is None else self._resume_step
            self._rewrite(columns, lambda kept: int(kept["step"]) < before)
            self._resume_step, self._resumes = before, False
        elif columns != self._columns or not self.path.exists():
            self._rewrite(columns, lambda kept: True)
        self._columns = columns
        if self._resume_step is not None and step < self._resume_step:
            again = set(row)
            self._rewrite(
                columns, lambda kept: int(kept["step"]) != step or {k for k, v in kept.items() if v != ""} != again
            )

    def _rewrite(self, columns: Sequence[str], keep: Callable[[dict[str, str]], bool]) -> None:
        rows: list[dict[str, str]] = []
        if self.path.exists():
            whole, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")  # a row cut by a crash is none
            rows = [row for row in csv.DictReader(whole.splitlines()) if keep(row)]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())


def _plain(value: float) -> float | int:
    return value if isinstance(value, int) else float(value)
