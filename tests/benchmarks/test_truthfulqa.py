"""The TruthfulQA benchmark as a person runs it, without the real data."""

import pytest

from tests.benchmarks.command import result_of, run_benchmark


@pytest.mark.slow
def test_quick_truthfulqa_is_faster_than_a_pass_an_answer_with_the_same_figures() -> None:
    done = run_benchmark("truthfulqa.py", "--quick", "--threads", "1")
    assert done.returncode == 0, done.stderr
    result = result_of(done.stdout)
    assert list(result) == ["speedup", "speedup_vs_different_answers", "max_difference"]
    assert result["max_difference"] < 1e-4
    assert result["speedup"] > 0
    assert "48 questions in 5 turns" in done.stdout


@pytest.mark.slow
def test_a_file_that_is_not_there_is_one_line() -> None:
    done = run_benchmark("truthfulqa.py", "--data", "no/mc_task.json")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "benchmark: path: cannot read no/mc_task.json (No such file or directory; expected .json, .jsonl, "
        ".parquet, .csv or hub:truthfulqa/truthful_qa[@REVISION])"
    ]
