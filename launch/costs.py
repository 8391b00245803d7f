"""Costs of what would be asked of models, as a dry run prints them: passes and tokens, by analysis."""

from collections.abc import Mapping, Sequence

from analysis.contract import Cost
from launch.screen import FittingTable, console


def say_costs(costs: Mapping[str, Sequence[Cost]], notes: Sequence[str] = ()) -> None:
    """Print what would be run.

    Args:
        costs: analysis → its parts.
        notes: lines on what would not be.
    """
    if costs:
        console().print(costs_table(costs))
    else:
        console().print("Would run nothing: what is asked is read off the run’s folder.")
    for line in notes:
        console().print(line, soft_wrap=True, markup=False)


def costs_table(costs: Mapping[str, Sequence[Cost]]) -> FittingTable:
    """A table of the passes that would be run, by analysis."""
    table = FittingTable(title="Would run", title_justify="left", title_style="bold")
    for column, justify in (("analysis", "left"), ("", "left"), ("passes", "right"), ("tokens", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, parts in costs.items():
        for i, cost in enumerate(parts):
            table.add_row("" if i else name, cost.name, f"{cost.forwards:,.1f}", f"{cost.tokens:,}")
    return table
