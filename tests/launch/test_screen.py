"""Tables in a terminal of any width."""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from analysis.contract import Cost
from launch.costs import costs_table
from launch.results import behaviour_of, geometry_of
from launch.screen import behaviour_table, geometry_tables, result_table
from tests.analysis import planted_behaviour, planted_geometry
from tests.launch.test_geometry_table import write_metrics


def of_geometry(folder: Path) -> Iterable[Table]:
    write_metrics(folder / "metrics.csv", planted_geometry.run_rows())
    return geometry_tables(geometry_of(folder))


def of_behaviour(folder: Path) -> Iterable[Table]:
    planted_behaviour.write(folder, planted_behaviour.LOOKS)
    return [behaviour_table(behaviour_of(folder))]


def of_costs(folder: Path) -> Iterable[Table]:
    return [costs_table({"steering_sweep": [Cost("choosing a site and a coefficient", 1234.5, 123_456_789)]})]


def of_results(folder: Path) -> Iterable[Table]:
    return [result_table([("held-out preference accuracy", "0.750  (95 % CI 0.512 … 0.912, 20 pairs)")])]


def words(texts: Iterable[str]) -> str:
    return " ".join(" ".join(texts).split())


@pytest.mark.parametrize("width", [32, 40, 60, 80])
@pytest.mark.parametrize("tables", [of_geometry, of_behaviour, of_costs, of_results])
def test_no_figure_is_cut_in_a_narrow_terminal(
    tables: Callable[[Path], Iterable[Table]], width: int, tmp_path: Path
) -> None:
    made: Sequence[Table] = list(tables(tmp_path))
    out = io.StringIO()
    Console(file=out, width=width).print(*made)
    said = "".join(character if character not in "│┃" else " " for character in out.getvalue())
    assert max(map(len, said.splitlines())) <= width
    for table in made:
        for cell in (cell for column in table.columns for cell in column.cells):
            for word in str(cell).split():
                assert word in said.split() or len(word) > 14, f"{word} of {cell}"
