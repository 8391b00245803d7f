"""Scores on disk: ``behaviour_by_step.csv``, a row a figure, and ``samples.csv``, a row a completion; whole or not there."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from tiltmeter.errors import UserError
from tiltmeter.files import write_atomically
from tiltmeter.scoring.scorer import Figure, Sample, Scores

FIGURES, SAMPLES = "behaviour_by_step.csv", "samples.csv"
_WHEN = ["steps_taken", "epoch"]
_FIGURE_KEY = ["steps_taken", "metric", "of"]
_SAMPLE_KEY = ["steps_taken", "pair_id", "sample"]
_TEXT = ["metric", "of", "scorer", "pair_id", "prompt", "base", "policy", "chosen"]
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

Cell = str | float | int


class BehaviourTables:
    """The two tables of a folder; scores of a moment may come in several parts and at any time.

    Args:
        folder: where they are; made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, step: int, epoch: int, samples: Sequence[Sample], scores: Scores) -> None:
        """Add or replace the figures and columns of one moment."""
        self._merge(FIGURES, figure_table(step, epoch, scores.figures), _FIGURE_KEY)
        self._merge(SAMPLES, sample_table(step, epoch, samples, scores.columns), _SAMPLE_KEY)

    def forget_after(self, step: int) -> None:
        """Drop what was scored after a step that will be taken again."""
        for name in (FIGURES, SAMPLES):
            table = read_table(self.folder / name)
            if not table.empty and (table["steps_taken"] > step).any():
                self._write(name, table[table["steps_taken"] <= step])

    def _merge(self, name: str, new: pd.DataFrame, key: list[str]) -> None:
        if new.empty:
            return
        old = read_table(self.folder / name)
        if old.empty:
            self._write(name, new)
            return
        known, fresh = old.set_index(key), new.set_index(key)
        merged = fresh.combine_first(known)  # new values first, old ones where there is no new column
        columns = [*known.columns, *(c for c in fresh.columns if c not in known.columns)]
        order = dict.fromkeys([*known.index, *fresh.index])
        self._write(name, merged.reindex(list(order))[columns].rename_axis(key).reset_index())

    def _write(self, name: str, table: pd.DataFrame) -> None:
        columns = [*_WHEN, *(c for c in table.columns if c not in _WHEN)]
        write_atomically(self.folder / name, lambda path: table[columns].to_csv(path, index=False, lineterminator="\n"))


def figure_table(step: int, epoch: int, figures: Sequence[Figure]) -> pd.DataFrame:
    """A row a figure."""
    return pd.DataFrame([{"steps_taken": step, "epoch": epoch, **_figure_row(figure)} for figure in figures])


def sample_table(
    step: int, epoch: int, samples: Sequence[Sample], columns: Mapping[str, Sequence[float]]
) -> pd.DataFrame:
    """A row a completion, with a column a score."""
    rows = pd.DataFrame([{"steps_taken": step, "epoch": epoch, **_sample_row(sample)} for sample in samples])
    return rows.assign(**{name: list(column) for name, column in columns.items()})


def read_table(path: Path) -> pd.DataFrame:
    """A table that was written here; empty when there is none.

    Raises:
        UserError: damaged.
    """
    if not path.is_file():
        return pd.DataFrame()
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)  # else a completion that says "NA" would be missing
        for column in table.columns.difference(_TEXT):
            table[column] = pd.to_numeric(table[column].replace("", None))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]}); delete it to go on") from error
    if "steps_taken" not in table.columns:
        raise UserError(
            f"{path}: expected a column steps_taken, got {', '.join(table.columns)[:120]}; delete it to go on"
        )
    return table


def _figure_row(figure: Figure) -> dict[str, Cell]:
    return {
        "metric": figure.name,
        "of": figure.of,
        "value": figure.value,
        "ci_low": figure.low,
        "ci_high": figure.high,
        "n": figure.n,
        "n_missing": figure.n_missing,
        "scorer": figure.scorer,
    }


def _sample_row(sample: Sample) -> dict[str, Cell]:
    return {
        "pair_id": sample.pair_id,
        "sample": sample.index,
        "prompt": as_cell(sample.prompt),
        "base": as_cell(sample.base.text),
        "policy": as_cell(sample.policy.text),
        "chosen": as_cell(sample.chosen),
    }


def as_cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula; characters that only a terminal obeys are left out.

    >>> as_cell("=1+1"), as_cell(" Hello."), as_cell("red" + chr(27) + "[31m")
    ("'=1+1", ' Hello.', 'red[31m')
    """
    plain = "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160))
    plain = plain.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair can't be written
    return f"'{plain}" if plain.startswith(_FORMULA) else plain
