"""The cost of watching as a person measures it, on runs of three steps, and the pieces that it is measured with."""

import pytest

from benchmarks import watched_run
from benchmarks.watched_run import RunSettings, Stopwatch, composed, turn_lengths
from tests.benchmarks.command import in_miniature, result_of, run_benchmark


@pytest.mark.slow
def test_quick_comparison_ends_with_its_figures() -> None:
    done = run_benchmark("watching.py", "--quick", "--threads", "1", before=in_miniature)
    assert done.returncode == 0, done.stderr
    result = result_of(done.stdout)
    assert list(result) == ["time_overhead", "memory_overhead"]
    assert result["time_overhead"] > -1
    assert -0.2 < result["memory_overhead"] < 0.5
    assert "stand-in" in done.stdout
    assert "loss curves are the same to the last digit" in done.stdout, "watching must not change the training"
    for part in ("forward passes over the probe", "HiddenStateSnapshot", "PreferenceProjection", "GradientGeometry"):
        assert part in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--quick", "--turns", "4"), "3 optimizer steps, which can't be cut into 4 turns"),
        (("--data", "no_such_file.jsonl"), "no_such_file.jsonl"),
    ],
)
def test_wrong_options_are_one_line(arguments: tuple[str, ...], expected: str) -> None:
    done = run_benchmark("watching.py", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert expected in done.stderr.strip().splitlines()[-1]


def test_both_sides_are_the_experiment_and_differ_in_callbacks_alone() -> None:
    watched, plain = (composed(RunSettings("f", choice, "r", "hh.jsonl", ())) for choice in ("geometry", "none"))
    assert watched.callbacks
    assert not plain.callbacks
    watched.callbacks = plain.callbacks
    assert watched == plain
    assert (plain.name, plain.datamodule.train_pairs, plain.datamodule.probe_pairs) == ("tiny_hh", 1150, 128)
    assert plain.trainer.val_check_interval == 0.5


def test_turns_hold_every_step_and_the_start() -> None:
    for n_steps, n_turns in ((72, 12), (3, 1), (7, 7)):
        first, *timed = turn_lengths(n_steps, n_turns)
        assert first == 0
        assert len(timed) == n_turns
        assert sum(timed) == n_steps + 1


def test_a_stopwatch_leaves_out_what_is_timed_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 8.0, 9.0])  # outer begins, inner begins, inner ends, outer ends
    monkeypatch.setattr(watched_run.time, "perf_counter", lambda: next(times))
    clock = Stopwatch()
    inner = clock.timed(lambda: None, "inner")
    with clock.running("outer"):
        inner()
    assert clock.seconds == {"outer": 3.0, "inner": 5.0}
