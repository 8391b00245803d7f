"""The table of docs/scorers.md, and what the benchmark says when there is nothing to measure."""

import re
from pathlib import Path

import pytest

from tests.benchmarks.command import run_benchmark
from tests.processes import ROOT


@pytest.mark.slow
def test_the_word_list_agrees_with_labels_as_the_page_says(shared_data: Path) -> None:
    done = run_benchmark("toxicity_auc.py", "--data", str(shared_data.resolve()))
    assert done.returncode == 0, done.stderr
    measured = dict(re.findall(r"(\w+)=([\d.]+)", done.stdout.splitlines()[-1]))
    page = (ROOT / "docs" / "scorers.md").read_text(encoding="utf-8")
    written = re.findall(r"^\|[^|]+\| [\d,]+ \| [\d,]+ \| (0\.\d+) \|", page, flags=re.MULTILINE)
    assert [float(area) for area in measured.values()] == pytest.approx([float(area) for area in written], abs=6e-4)


@pytest.mark.slow
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for arguments, message in (
        ((), "--data: expected a folder, got none, and TILTMETER_SHARED is not set"),
        (("--data", str(tmp_path)), "--data: no such file: "),
        (("--words-file", "x", "--model", "y", "--data", "."), "--words-file: not with --model"),
    ):
        done = run_benchmark("toxicity_auc.py", *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1
