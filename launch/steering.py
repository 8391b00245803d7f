"""A sweep from the command line: a progress bar with the time left, a table that survives a stop."""

from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

from analysis.figures.fig2_steering import VECTORS_FILE, steering_section_of
from analysis.open.checkpoints import Checkpoints
from analysis.report.page import Section
from analysis.steering.sweep import SteeringSweep, Sweep
from analysis.steering.table import Rows, SweepTable
from analysis.steering.vectors import describe
from launch.screen import console
from tiltmeter.files import write_text
from tiltmeter.steering.vector import save_vectors


@dataclass(frozen=True)
class Swept:
    """A sweep that was run to its end.

    Args:
        missing: scorers without figures, each with the number of units that it left open.
    """

    section: Section
    missing: dict[str, int]


def sweep_into(
    tables: Path, asked: SteeringSweep, checkpoints: Checkpoints, *, goes_on_with: str | None = None
) -> Swept | None:
    """Sweep what is not in the table yet and draw it; None where that is not enough for a figure.

    Args:
        tables: folder of ``sweep.csv``.
        asked: its scorers started.
        goes_on_with: what to add to the command so that it goes on with this table after a stop; None: nothing.

    Raises:
        UserError: options that don't fit the models, or a table of other settings.
        FailedWrite: a full disk …; what the table holds by then is gone on with.
    """
    sweep = asked.plan(checkpoints)
    for note in [*asked.notes, *sweep.made.notes]:
        console().print(note)
    table = SweepTable(tables, sweep.settings, restart=asked.restart)
    named = {f"{v.site}/{name}" + (f"_{draw}" if draw else ""): v for name, draw, v in sweep.made.named()}
    save_vectors(tables.parent / "vectors" / VECTORS_FILE, named)
    write_text(tables / "steering_vectors.csv", describe(sweep.made).to_csv(index=False, lineterminator="\n"))
    open_units = _fill(table, sweep, goes_on_with)
    section = steering_section_of(tables)
    missing = [name for rows in open_units for name in rows.missing]
    return Swept(section, {name: missing.count(name) for name in missing}) if section else None


def _fill(table: SweepTable, sweep: Sweep, goes_on_with: str | None) -> list[Rows]:
    """Take what is missing; returns what could not be finished, which stands at the end of the table."""
    todo = [unit for unit in sweep.units if unit not in table.finished]
    if table.finished:
        there = f"going on, {len(table.finished)} of {len(sweep.units)} parts are there"
        console().print(f"{table.path}: {there}", soft_wrap=True)
    elif goes_on_with:
        console().print(f"{table.path}: after a stop, go on with {goes_on_with}", soft_wrap=True)
    unfinished = []
    for unit in track(todo, description="Steering", console=console(), disable=not todo):
        taken = sweep.rows(unit)
        if taken.missing:
            unfinished.append(taken)
        else:
            table.append(unit, taken)
    table.append_unfinished(unfinished)
    return unfinished
