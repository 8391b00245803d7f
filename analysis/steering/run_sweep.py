"""A sweep that is run: a progress bar with the time left, a table that survives a stop, and the section of what is there."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from analysis.contract import Asking, Cost
from analysis.figures.fig2_steering import VECTORS_FILE, steering_section_of
from analysis.report.page import Section
from analysis.steering.sweep import Sweep, sweep_costs
from analysis.steering.table import OtherSettings, Rows, SweepTable
from analysis.steering.vectors import describe
from tiltmeter.files import write_text
from tiltmeter.steering.vector import save_vectors


class Swept(NamedTuple):
    """Tables of a sweep on disk."""

    tables: Path
    missing: Mapping[str, int]
    """Scorers without figures, each with the number of units that it left open."""


def cost_of_sweep(asking: Asking) -> list[Cost]:
    """Passes and tokens; vectors are estimated for it."""
    return sweep_costs(asking.question.plan(asking.models))


def run_sweep(asking: Asking) -> Swept:
    """Sweep what is not in the tables yet.

    Raises:
        UserError: options that don't fit the models, or, where these are not shown as they are, tables of other settings.
        FailedWrite: a full disk …; what the tables hold by then is gone on with.
    """
    asked, tables = asking.question, asking.tables
    sweep = asked.plan(asking.models)
    for note in [*asked.notes, *sweep.made.notes]:
        _console().print(note)
    try:
        table = SweepTable(tables, sweep.settings, restart=asked.restart)
    except OtherSettings as error:
        if not asking.takes_old:
            raise
        _say(f"{error}; here it is shown as it is")
        return Swept(tables, {})
    named = {f"{v.site}/{name}" + (f"_{draw}" if draw else ""): v for name, draw, v in sweep.made.named()}
    save_vectors(tables.parent / "vectors" / VECTORS_FILE, named)
    write_text(tables / "steering_vectors.csv", describe(sweep.made).to_csv(index=False, lineterminator="\n"))
    missing = [name for rows in _fill(table, sweep, asking.goes_on_with) for name in rows.missing]
    return Swept(tables, {name: missing.count(name) for name in missing})


def swept_section(swept: Swept) -> Section | None:
    """The section ``steering_sweep``; None where there is not enough for a figure."""
    section = steering_section_of(swept.tables)
    lost = [f"{name} ({n} of the vectors)" for name, n in swept.missing.items()]
    return section and replace(section, lost=lost)


def _fill(table: SweepTable, sweep: Sweep, goes_on_with: str | None) -> list[Rows]:
    """Take what is missing; returns what could not be finished, which stands at the end of the table."""
    todo = [unit for unit in sweep.units if unit not in table.finished]
    if table.finished:
        there = f"going on, {len(table.finished)} of {len(sweep.units)} parts are there"
        _say(f"{table.path}: {there}")
    elif goes_on_with:
        _say(f"{table.path}: after a stop, go on with {goes_on_with}")
    unfinished = []
    for unit in track(todo, description="Steering", console=_console(), disable=not todo):
        taken = sweep.rows(unit)
        if taken.missing:
            unfinished.append(taken)
        else:
            table.append(unit, taken)
    table.append_unfinished(unfinished)
    return unfinished


def _say(text: str) -> None:
    _console().print(text, soft_wrap=True)


def _console() -> Console:
    return Console(highlight=False, markup=False)
