"""``sweep.csv``: rows are appended as they are finished, so a sweep that was stopped goes on where it was.

Beside it ``sweep_pairs.csv`` has what each pair adds to them, which paired comparisons of vectors need, and ``sweep.json``
says with which settings both were made and how far they are: a row that was being written when the process ended is cut off
and taken again, and rows of other settings never meet.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from tiltmeter.errors import UserError
from tiltmeter.files import write_json, write_text, writing
from tiltmeter.steering.vector import V_STAR

TABLE, PAIRS, SETTINGS, VECTORS = "sweep.csv", "sweep_pairs.csv", "sweep.json", "steering_vectors.csv"
Part = Literal["choosing", "teacher_forced", "generated"]
"""``choosing``: v* on the pairs that it was estimated on, by which the site of a headline is chosen."""
CHOOSING = "recovery_on_estimation_pairs"
"""Metric of the part ``choosing``."""
DEGENERATION_P = "degeneration_p"
"""Metric: p-value of the exact test whether completions are degenerate more often than without steering."""
_SHOWN = 60
"""Characters of a setting that an error shows."""


class Unit(NamedTuple):
    """One piece of computation: one vector at one site, or all draws of a random kind there; all λ."""

    direction: Literal["interpolation", "inversion"]
    vector: str
    """Name of a vector, or a random kind."""
    site: str
    part: Part


class Row(NamedTuple):
    """A row of the table."""

    direction: str
    vector: str
    """Name of a vector, or a random kind."""
    draw: int
    """Number of the vector of a random kind, from 1; 0: not random, or all draws of the kind together."""
    site: str
    strength: float
    """λ; of random vectors in lengths of the v* of the site."""
    metric: str
    value: float
    ci_low: float
    ci_high: float
    n: int
    operator: str = "add"
    """Operation along the vector (:mod:`tiltmeter.steering.operators`)."""


class PairRow(NamedTuple):
    """Sums of one pair over the tokens of its chosen response, teacher-forced."""

    direction: str
    vector: str
    draw: int
    site: str
    strength: float
    norm: float
    """Length of what was added, below 0 where it was subtracted: λ ‖v‖."""
    pair_id: str
    prompt: str
    """A hash: pairs of equal ones are drawn together."""
    n_tokens: int
    kl: float
    """KL(goal ‖ steered), nats."""
    kl_from_start: float
    """KL(unsteered ‖ steered), nats."""
    preference_odds: float
    chosen_log_prob: float
    """log π of the chosen response, nats."""


class Rows(NamedTuple):
    """Rows of a unit."""

    rows: list[Row]
    pairs: Sequence[PairRow] = ()
    missing: Sequence[str] = ()
    """Scorers whose figures are missing, so that the unit is to be taken again."""


COLUMNS = tuple(name.replace("strength", "lambda") for name in Row._fields)
PAIR_COLUMNS = tuple(name.replace("strength", "lambda") for name in PairRow._fields)
_FILES = {TABLE: COLUMNS, PAIRS: PAIR_COLUMNS}
_TEXTS = ("direction", "vector", "site", "metric", "pair_id", "prompt", "operator")
_ADDED = "operator"
"""Last column of the table, and a setting, which tables had none of while there was one operator alone."""
_MAY_BE_EMPTY = ("value", "ci_low", "ci_high", "kl", "kl_from_start", "preference_odds", "chosen_log_prob")


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
        self.folder, self.path, self._state = folder, folder / TABLE, folder / SETTINGS
        self.settings = json.loads(json.dumps(settings))
        self.finished: list[Unit] = []
        if not restart and self.path.exists():
            self._resume()
        else:
            for name, columns in _FILES.items():
                write_text(folder / name, _as_csv([columns]))
            self._note()

    def append(self, unit: Unit, taken: Rows) -> None:
        """Add the rows of a unit and note that it is finished."""
        self._write(taken)
        self.finished.append(unit)
        self._note()

    def append_unfinished(self, taken: Sequence[Rows]) -> None:
        """Add what there is of units that are not finished, after all that are: to be seen, and taken again by the next run."""
        for one in taken:
            self._write(one)

    def _write(self, taken: Rows) -> None:
        for name, rows in ((TABLE, taken.rows), (PAIRS, taken.pairs)):
            path = self.folder / name
            with writing(path), path.open("a", encoding="utf-8", newline="") as file:
                file.write(_as_csv(rows))

    def _resume(self) -> None:
        state = _read_state(self._state)
        for key in dict.fromkeys([*self.settings, *state["settings"]]):
            before, now = (str(of.get(key))[:_SHOWN] for of in (state["settings"], self.settings))
            if state["settings"].get(key) != self.settings.get(key):
                raise OtherSettings(
                    f"{self.path}: was begun with {key}={before}, now it is {now}; set it back to go on, or begin anew with "
                    "steering.restart=true"
                )
        self.finished = [Unit(*unit) for unit in state["finished"]]
        for name in _FILES:
            path, n_bytes = self.folder / name, state["bytes"][name]
            if not path.exists() or path.stat().st_size < n_bytes:
                raise UserError(f"{path}: rows are missing at its end; {_BEGIN_ANEW}")
            with path.open("r+b") as file:
                file.truncate(n_bytes)
        read_sweep(self.path)
        read_pairs(self.folder / PAIRS)
        self._add_column()

    def _add_column(self) -> None:
        """Give a table of before the column that it lacks."""
        head, *rows = self.path.read_text(encoding="utf-8").splitlines()
        if not head.endswith(f",{_ADDED}"):
            lines = [f"{head},{_ADDED}", *(f"{row},add" for row in rows)]
            write_text(self.path, "".join(f"{line}\n" for line in lines))
            self._note()

    def _note(self) -> None:
        sizes = {name: (self.folder / name).stat().st_size for name in _FILES}
        write_json(self._state, {"settings": self.settings, "finished": self.finished, "bytes": sizes})


_BEGIN_ANEW = "begin anew with analysis=steering_sweep steering.restart=true"


def read_sweep(path: Path) -> pd.DataFrame:
    """The table; NaN where a number is not known.

    Raises:
        UserError: no such file, or it is damaged; names the file.
    """
    return _read(path, COLUMNS)


def read_pairs(path: Path) -> pd.DataFrame:
    """Read the sums of each pair (:class:`PairRow`). Raises UserError: no such file, or it is damaged."""
    return _read(path, PAIR_COLUMNS)


def _read(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    types = {name: "str" if name in _TEXTS else "float64" for name in columns}
    try:
        table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run analysis=steering_sweep") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())[:100]}); {_BEGIN_ANEW}") from error
    if _ADDED in columns and _ADDED not in table:
        table[_ADDED] = "add"
    if list(table.columns) != list(columns):
        raise UserError(f"{path}: expected the columns {', '.join(columns)}; {_BEGIN_ANEW}")
    never_empty = pd.Index(columns).difference(_MAY_BE_EMPTY, sort=False)
    if table[never_empty].isna().to_numpy().any():
        raise UserError(f"{path}: damaged (a row without its {', '.join(never_empty)}); {_BEGIN_ANEW}")
    return table


def read_settings(folder: Path) -> dict[str, Any]:
    """Settings the sweep table was made with. Raises UserError: damaged."""
    settings: dict[str, Any] = _read_state(folder / SETTINGS)["settings"]
    return settings


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        is_whole = isinstance(state["settings"], dict) and all(type(state["bytes"][name]) is int for name in _FILES)
        state["settings"].setdefault(_ADDED, "add")
        if not (is_whole and all(len(unit) == len(Unit._fields) for unit in state["finished"])):
            raise ValueError("another content")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{path}: expected the settings that the sweep was made with ({reason}); {_BEGIN_ANEW}"
        ) from error
    return state  # type: ignore[no-any-return]


def read_vectors(folder: Path) -> pd.DataFrame:
    """A row for each vector that was swept (:func:`analysis.steering.vectors.describe`); empty where there is no such table."""
    path = folder / VECTORS
    return pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame()


def nearest_to_one(strengths: Sequence[float]) -> float:
    """The λ at which vectors are compared: 1, the length of v*, or what the grid has nearest to it.

    >>> nearest_to_one([0.0, 0.75, 2.0])
    0.75
    """
    return min((x for x in strengths if x), key=lambda x: abs(x - 1))


def rows_of(table: pd.DataFrame, direction: str, vector: str, site: str | None, metric: str) -> pd.DataFrame:
    """Rows of a vector, in the order of λ."""
    found = table[(table["direction"] == direction) & (table["vector"] == vector) & (table["metric"] == metric)]
    return (found if site is None else found[found["site"] == site]).sort_values("lambda")


def value_at(table: pd.DataFrame, direction: str, vector: str, site: str, metric: str, strength: float) -> float:
    """One value of the table; NaN where it has none."""
    rows = rows_of(table, direction, vector, site, metric)
    rows = rows[rows["lambda"] == strength]
    return math.nan if rows.empty else float(rows["value"].iloc[0])


def compared_at(table: pd.DataFrame) -> float:
    """The λ that vectors are compared at."""
    return nearest_to_one(table[table["vector"] == V_STAR]["lambda"].unique().tolist())


def best_site(table: pd.DataFrame, direction: str) -> str:
    """The site where v* recovers most at λ = 1 of the pairs that it was estimated on, which no other number is of."""
    return sites_by_recovery(table, direction)[0]


def sites_by_recovery(table: pd.DataFrame, direction: str) -> list[str]:
    """Sites by what v* recovers there of the pairs that it was estimated on, most first."""
    rows = rows_of(table, direction, V_STAR, None, CHOOSING)
    ranked: list[str] = rows.sort_values("value", ascending=False, kind="stable")["site"].tolist()
    return ranked


def _as_csv(rows: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([[_as_text(x) if isinstance(x, float) else x for x in row] for row in rows])
    return file.getvalue()


def _as_text(x: float) -> str:
    """Nine digits, more than float32 has; empty for NaN."""
    return "" if x != x else f"{x:.9g}"
