"""A sweep from the command line: what it will take, a progress bar with the time left, a table that survives a stop."""

from pathlib import Path

from rich.markup import escape
from rich.progress import track
from rich.table import Table

from analysis.checkpoints import Checkpoints
from analysis.report import Section
from analysis.steering_section import steering_section_of
from analysis.steering_sweep import SteeringSweep, Sweep
from analysis.sweep_table import SweepTable
from launch.screen import console
from tiltmeter.errors import UserError


def sweep_into(tables: Path, asked: SteeringSweep, checkpoints: Checkpoints) -> Section | None:
    """Sweep what is not in the table yet and draw it; None for a dry run, which only says what would be run.

    Args:
        tables: folder of ``sweep.csv``.

    Raises:
        UserError: options that don't fit the models, or a table of other settings.
    """
    sweep = asked.start(checkpoints)
    if asked.added_zero:
        console().print(
            "steering.lambdas: 0 was missing and is added: the model as it is, which all else is compared with."
        )
    if asked.dry_run:
        console().print(cost_table(sweep))
        return None
    try:
        table = SweepTable(tables, sweep.settings, restart=asked.restart)
        todo = [unit for unit in sweep.units if unit not in table.finished]
        if table.finished:
            console().print(
                f"{escape(str(table.path))}: going on, {len(table.finished)} of {len(sweep.units)} parts are there"
            )
        for unit in track(todo, description="Steering", console=console(), disable=not todo):
            table.append(unit, sweep.rows(unit))
    except OSError as error:
        raise UserError(f"{tables}: cannot be written ({error.strerror or error}); check the folder") from error
    return steering_section_of(tables)


def cost_table(sweep: Sweep) -> Table:
    """What a sweep would take."""
    table = Table(title="Would run", title_justify="left", title_style="bold")
    for column, justify in (("", "left"), ("passes", "right"), ("tokens", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for cost in sweep.costs():
        table.add_row(cost.name, f"{cost.forwards:,.1f}", f"{cost.tokens:,}")
    kinds = f"{len(sweep.vectors)} vectors, added and subtracted, {len(sweep.asked.lambdas)} λ"
    table.caption = f"{len(sweep.units)} parts: {kinds}"
    return table
