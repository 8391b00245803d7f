"""Hidden states observed before and after training: kept by a run, or read of two models now."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
from torch import Tensor

from analysis.open.observations import USUAL_POSITION, latest, observed, updates
from analysis.open.probe_pairs import PROMPTS_FILE, read_probe_pairs
from analysis.open.stored_head import unembedding_rows
from tiltmeter.metric_names import STEPS_TAKEN
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM
from tiltmeter.states.capture import ReadPoint
from tiltmeter.states.positions import Position
from tiltmeter.states.snapshots import BASE, MANIFEST, SnapshotReader
from tiltmeter.states.state_pair import StatePair
from tiltmeter.weights.random_update import RandomUpdates

_STEP_NAME = re.compile(r"(epoch|step)=(\d+)")
Tables = Mapping[str, pd.DataFrame]
"""Tables that a section is drawn from, by the names of the report's files; its own table bears its name."""


@dataclass(frozen=True, eq=False)
class Observed:
    """The figures by site, the rows of both models behind them, and the same under random weights; rows are read when asked for.

    Args:
        metrics: named as in metrics.csv.
        table: a row for each observation, position and site (:func:`analysis.open.observations.observed`).
        read_states: the last observation beside the base's; None where there is none.
        read_random: the update's random counterparts; None where there are none.
        read_unembedding: e_t of the base for token ids [token, d_model] and the model they come from; None where not known.
    """

    metrics: pd.DataFrame
    table: pd.DataFrame
    read_states: Callable[[], StatePair | None]
    read_random: Callable[[], RandomUpdates | None]
    read_unembedding: Callable[[Sequence[int], int], tuple[Tensor, str] | None]
    _kept: dict[object, pd.DataFrame | None] = field(default_factory=dict, repr=False)

    @classmethod
    def stored(cls, folder: Path, metrics: pd.DataFrame) -> "Observed":
        """Rows that a run has kept so far, finished or not; a damaged file is named once it is needed."""
        table = observed(metrics)
        random = partial(_stored_random, folder / "snapshots", steps_of(table))
        return cls(
            metrics, table, partial(_stored_states, folder, metrics), random, partial(_stored_unembedding, folder)
        )

    @cached_property
    def states(self) -> StatePair | None:
        """Every finite row. Raises UserError: a file is damaged; names it."""
        found = self.read_states()
        return None if found is None else found.finite()

    @cached_property
    def random(self) -> RandomUpdates | None:
        """The update's random counterparts. Raises UserError: their file is damaged; names it."""
        return self.read_random()

    @property
    def lacks_random(self) -> bool:
        """Whether there is an update without random counterparts."""
        return steps_of(self.table) is not None and self.random is None

    @property
    def n_pairs(self) -> int:
        """Pairs whose states are known and finite."""
        return 0 if self.states is None else len(self.states.pair_ids or ())

    def at(self, position: Position | None = None) -> StatePair | None:
        """The rows of one position; None without two of them, or where nothing changed.

        Args:
            position: None: ``prompt_last``, or the first one where it was not read.

        Raises:
            UserError: a file is damaged; names it.
        """
        if self.states is None:
            return None
        there = self.states.positions
        position = position or (USUAL_POSITION if USUAL_POSITION in there else there[0])
        found = self.states.at(position)
        return found if found.n_rows > 1 and found.has_changed() else None

    def once(self, make: Callable[[StatePair], pd.DataFrame]) -> pd.DataFrame | None:
        """A table of the rows that figures show, computed once for all sections; None without rows."""
        if make not in self._kept:
            rows = self.at()
            self._kept[make] = None if rows is None else make(rows)
        return self._kept[make]


def steps_of(table: pd.DataFrame) -> int | None:
    """Optimizer steps behind the last update that was read; None without one, or where they are not known."""
    steps = latest(updates(table))["steps_taken"].dropna()
    return int(steps.iloc[0]) if len(steps) else None


def latest_name(names: Sequence[str], metrics: pd.DataFrame) -> str | None:
    """The stored observation that was taken last; names tell steps or epochs, metrics.csv when each epoch ended.

    >>> seen = pd.DataFrame({STEPS_TAKEN: [0, 5, 10], "epoch": [0, 0, 1]})
    >>> latest_name(["base", "epoch=000", "step=000007"], seen), latest_name(["base"], seen)
    ('step=000007', None)
    """
    ends: dict[int, float] = {}
    if STEPS_TAKEN in metrics and "epoch" in metrics:
        ends = metrics.groupby("epoch")[STEPS_TAKEN].max().dropna().to_dict()
    taken = {}
    for name in names:
        if match := _STEP_NAME.fullmatch(name):
            number = int(match[2])
            taken[name] = float(number) if match[1] == "step" else float(ends.get(number, number))
    return max(taken, key=lambda name: taken[name]) if taken else None


def about(rows: StatePair, points: Sequence[ReadPoint] | None = None) -> pd.DataFrame:
    """Columns that name the rows of a figure: a row for each site."""
    said = {"snapshot": rows.name, "dtype": rows.dtype, "n_rows": rows.n_rows, "n_left_out": rows.n_left_out}
    return pd.DataFrame([{"site": p.site, "position": p.position} | said for p in points or rows.points])


def row_notes(said: pd.DataFrame) -> list[str]:
    """Notes that a reader of rows needs, out of :func:`about`."""
    lines, first = [], said.iloc[0]
    if first["n_left_out"]:
        lines.append(f"{first['n_left_out']} pairs whose states hold NaN or infinity are left out.")
    if first["dtype"] != "float32":
        lines.append(
            f"States were kept as {first['dtype']}, whose rounding is 5 to 74 % of small updates and lowers cosines."
        )
    return lines


def shown_points(rows: StatePair) -> list[ReadPoint]:
    """The two sites of figures that have no room for all: the middle decoder block, and the one furthest along."""
    blocks = [point for point in rows.points if point.site not in (FINAL_PRE_NORM, FINAL_POST_NORM)]
    middle = [blocks[len(blocks) // 2]] if blocks else []
    return list(dict.fromkeys([*middle, rows.points[-1]]))


def _stored_states(folder: Path, metrics: pd.DataFrame) -> StatePair | None:
    if not (folder / "snapshots" / MANIFEST).is_file():
        return None
    reader = SnapshotReader(folder / "snapshots")
    name = latest_name(reader.names, metrics)
    if name is None or BASE not in reader.names or not reader.points:
        return None
    return reader.pair(name, {p.pair_id: (p.group, p.ids) for p in read_probe_pairs(folder / PROMPTS_FILE)})


def _stored_random(snapshots: Path, steps_taken: int | None) -> RandomUpdates | None:
    """Random counterparts of the last update, not of an earlier one."""
    found = RandomUpdates.read(snapshots)
    return found if found is not None and found.steps_taken == steps_taken else None


def _stored_unembedding(folder: Path, ids: Sequence[int], d_model: int) -> tuple[Tensor, str] | None:
    """The base's; without a copy of it, that of the aligned model, usually the same."""
    for name in ("base", "aligned"):
        found = unembedding_rows(folder / name, ids)
        if found is not None and found.shape[1] == d_model:
            return found, name
    return None
