import csv
from pathlib import Path

from launch.loggers.metrics_csv import MetricsCSV


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_new_metric_adds_a_column_and_leaves_earlier_rows_empty_there(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"train/loss": 0.5, "epoch": 0}, step=0)
    log.log_metrics({"val/loss": 0.25, "epoch": 0}, step=0)
    log.log_metrics({"train/loss": 0.125, "epoch": 1}, step=1)
    assert rows_of(tmp_path / "metrics.csv") == [
        {"step": "0", "epoch": "0", "train/loss": "0.5", "val/loss": ""},
        {"step": "0", "epoch": "0", "train/loss": "", "val/loss": "0.25"},
        {"step": "1", "epoch": "1", "train/loss": "0.125", "val/loss": ""},
    ]


def test_a_resumed_run_drops_the_rows_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path)
    for step in range(4):
        first.log_metrics({"train/loss": float(step), "epoch": 0}, step=step)
    resumed = MetricsCSV(path)
    resumed.log_metrics({"train/loss": 9.0, "epoch": 0}, step=2)
    assert [(row["step"], row["train/loss"]) for row in rows_of(path)] == [("0", "0.0"), ("1", "1.0"), ("2", "9.0")]


def test_a_row_that_a_crash_cut_short_is_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path)
    for step in (1, 10):
        first.log_metrics({"train/loss": float(step), "epoch": 0}, step=step)
    path.write_text(path.read_text(encoding="utf-8").removesuffix("0,0,10.0\n"), encoding="utf-8")  # "1" of step 10
    MetricsCSV(path, resume_step=10).log_metrics({"train/loss": 9.0, "epoch": 0}, step=10)
    assert [(row["step"], row["train/loss"]) for row in rows_of(path)] == [("1", "1.0"), ("10", "9.0")]


def test_values_keep_their_full_precision(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"x": 0.1 + 0.2}, step=0)
    assert float(rows_of(tmp_path / "metrics.csv")[0]["x"]) == 0.1 + 0.2
