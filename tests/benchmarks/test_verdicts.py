"""The benchmark of verdicts as a person runs it, on very little."""

import pytest

from tests.benchmarks.command import result_of, run_benchmark


@pytest.mark.slow
def test_few_draws_of_every_world_end_with_the_figures() -> None:
    done = run_benchmark("verdicts.py", "--draws", "2", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    result = result_of(done.stdout)
    assert tuple(result) == ("false_positive_max", "detection_min", "coverage_min")
    assert result["false_positive_max"] <= 0.5
    assert result["detection_min"] >= 0.5
    assert "planted rank found exactly" in done.stdout
