import io
from pathlib import Path

import pytest
from rich.console import Console

from launch.loggers.metrics_csv import MetricsCSV
from launch.results import geometry_of
from launch.screen import geometry_tables
from tests.analysis import planted_geometry as planted
from tests.analysis.conftest import dpo_rows


def write_metrics(path: Path, rows: list[dict[str, float]]) -> None:
    log = MetricsCSV(path)
    for row in rows:
        log.log_metrics({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))


@pytest.mark.parametrize("width", [80, 120])
def test_the_closing_table_has_a_line_for_every_site(tmp_path: Path, width: int) -> None:
    write_metrics(tmp_path / "metrics.csv", planted.run_rows())
    table = geometry_of(tmp_path)
    out = io.StringIO()
    Console(file=out, width=width).print(*geometry_tables(table))
    said = out.getvalue()
    assert "ΔH = policy − base at prompt_last, after 10 steps" in said
    for row in table.itertuples():
        shares, cosines = [line for line in said.splitlines() if row.site in line]
        assert f"{row.shift_share:.3f}" in shares
        assert f"{row.mean_cosine_leave_one_out:.3f}".lstrip("0") in cosines
    assert "…" not in said


def test_a_run_without_a_probe_has_none(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.csv", dpo_rows())
    assert geometry_of(tmp_path).empty
