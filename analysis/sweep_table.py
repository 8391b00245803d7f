"""``sweep.csv``: rows are appended as they are finished, so a sweep that was stopped goes on where it was.

Beside it ``sweep.json`` says with which settings it was made and how far it is: a row that was being written when the
process ended is cut off and taken again, and rows of other settings never meet.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from tiltmeter.errors import UserError
from tiltmeter.files import write_json

TABLE, SETTINGS = "sweep.csv", "sweep.json"
Kind = Literal["teacher_forced", "generated"]


class Unit(NamedTuple):
    """What is computed in one piece: one vector at one site, all λ."""

    direction: Literal["interpolation", "inversion"]
    vector: str
    site: str
    kind: Kind


class Row(NamedTuple):
    """A row of the table."""

    direction: str
    vector: str
    site: str
    strength: float
    metric: str
    value: float
    ci_low: float
    ci_high: float
    n: int


COLUMNS = ("direction", "vector", "site", "lambda", "metric", "value", "ci_low", "ci_high", "n")
_NUMBERS = ("lambda", "value", "ci_low", "ci_high", "n")
_NEVER_EMPTY = ("lambda", "n")


class OtherSettings(UserError):
    """A table is there already, and whole, but was made with other settings."""


class SweepTable:
    """An open table; see the module's head.

    Args:
        folder: of both files.
        settings: everything that changes a number in it; plain values.
        restart: begin anew, whatever is there.

    Raises:
        OtherSettings: the table was made with other settings.
        UserError: it is damaged.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path, self._state = folder / TABLE, folder / SETTINGS
        self.settings = json.loads(json.dumps(settings))
        self.finished: list[Unit] = []
        if not restart and self.path.exists():
            self._resume()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.write_text(_as_csv([COLUMNS]), encoding="utf-8", newline="")
            self._note()

    def append(self, unit: Unit, rows: Sequence[Row]) -> None:
        """Add the rows of a unit and note that it is finished."""
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_as_csv(rows))
        self.finished.append(unit)
        self._note()

    def _resume(self) -> None:
        state = _read_state(self._state)
        for key in dict.fromkeys([*state["settings"], *self.settings]):
            before, now = state["settings"].get(key), self.settings.get(key)
            if before != now:
                raise OtherSettings(
                    f"{self.path}: was begun with {key}={before}, now it is {now}; set it back to go on, or begin anew with "
                    "steering.restart=true"
                )
        self.finished = [Unit(*unit) for unit in state["finished"]]
        if self.path.stat().st_size < state["bytes"]:
            raise UserError(f"{self.path}: rows are missing at its end; {_BEGIN_ANEW}")
        with self.path.open("r+b") as file:
            file.truncate(state["bytes"])
        read_sweep(self.path)

    def _note(self) -> None:
        state = {"settings": self.settings, "finished": self.finished, "bytes": self.path.stat().st_size}
        write_json(self._state, state)


_BEGIN_ANEW = "begin anew with analysis=steering_sweep steering.restart=true"


def read_sweep(path: Path) -> pd.DataFrame:
    """The table; NaN where a number is not known.

    Raises:
        UserError: no such file, or it is damaged; names the file.
    """
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(_NUMBERS, "float64"), keep_default_na=False, na_values=[""])
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run analysis=steering_sweep") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())[:100]}); {_BEGIN_ANEW}") from error
    if tuple(table.columns) != COLUMNS:
        raise UserError(f"{path}: expected the columns {', '.join(COLUMNS)}; {_BEGIN_ANEW}")
    if table.drop(columns=[name for name in _NUMBERS if name not in _NEVER_EMPTY]).isna().to_numpy().any():
        raise UserError(
            f"{path}: damaged (a row without its direction, vector, site, lambda, metric or n); {_BEGIN_ANEW}"
        )
    return table


def read_settings(folder: Path) -> dict[str, Any]:
    """With which settings the table of a folder was made. Raises UserError: damaged."""
    settings: dict[str, Any] = _read_state(folder / SETTINGS)["settings"]
    return settings


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        is_whole = isinstance(state["settings"], dict) and type(state["bytes"]) is int
        if not (is_whole and all(len(unit) == len(Unit._fields) for unit in state["finished"])):
            raise ValueError("another content")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{path}: expected the settings that sweep.csv was made with ({reason}); {_BEGIN_ANEW}"
        ) from error
    return state  # type: ignore[no-any-return]


def _as_csv(rows: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([["" if x != x else x for x in row] for row in rows])
    return file.getvalue()
