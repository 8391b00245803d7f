"""What benchmarks/processes.py reads from two runs and compares."""

from pathlib import Path

import pytest

from benchmarks.processes import largest_difference, read_run
from tiltmeter.errors import UserError

HEAD = "step,train/loss,throughput/pairs_per_second,shift_share/delta/layer_00\n"


def run_of(folder: Path, *rows: str) -> Path:
    folder.mkdir()
    (folder / "metrics.csv").write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    return folder


def test_losses_geometry_and_time_come_from_metrics_csv(tmp_path: Path) -> None:
    one = read_run(run_of(tmp_path / "a", "0,,,", "1,0.5,1,", "2,0.4,1,", "3,0.3,4,", "4,0.2,2,0.75"))
    two = read_run(run_of(tmp_path / "b", "0,,,", "1,0.5,1,", "2,0.4,1,", "3,0.25,4,", "4,0.2,2,0.7"))
    assert one.seconds == pytest.approx((1 / 4 + 1 / 2) / 2), "the first two steps aren't timed"
    assert one.columns == two.columns
    assert largest_difference(one, two) == pytest.approx((0.05, 0.05 / 1.75))
    assert largest_difference(one, one) == (0, 0)


def test_geometry_at_other_steps_is_refused(tmp_path: Path) -> None:
    one = read_run(run_of(tmp_path / "a", "1,0.5,1,0.75", "2,0.4,1,", "3,0.3,4,"))
    two = read_run(run_of(tmp_path / "b", "1,0.5,1,", "2,0.4,1,0.75", "3,0.3,4,"))
    with pytest.raises(UserError, match="geometry: the runs logged it at other steps"):
        largest_difference(one, two)
