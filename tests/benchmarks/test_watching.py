"""The cost of watching as a person measures it, on runs of three steps, and the pieces that it is measured with."""

from functools import partial

import pytest
import torch

from benchmarks import watched_run
from benchmarks.observation_cost import N_SPECTRA, Case, decompose, held_mb, stream, synthetic_rows
from benchmarks.watched_run import RunSettings, Stopwatch, composed, turn_lengths
from benchmarks.watching import FULL_CASES, LAYERS, cost_row
from tests.benchmarks.command import few_texts, result_of, run_benchmark
from tiltmeter.geometry.moments import UpdateMoments


@pytest.mark.slow
def test_quick_comparison_ends_with_its_figures() -> None:
    done = run_benchmark("watching.py", "--quick", "--threads", "1", before=partial(few_texts, 120))
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


def test_what_accumulators_hold_does_not_grow_with_prompts() -> None:
    held = []
    for n_rows in (512, 4_096, 40_960):
        moments = [UpdateMoments(16)]
        stream(Case(n_rows, 16, n_sites=1), moments)
        held.append(held_mb(moments))
    rows, statistics = 3 * 512 * 16 * 4 / 1e6, 3 * (16 + 16 + 16 * 16) * 8 / 1e6
    assert held[0] == pytest.approx(rows)
    assert held[1] == held[2] == pytest.approx(statistics + rows), "means and scatters, and the rows that wait"


def test_streamed_rows_are_those_of_the_case_and_their_spectra_are_all_taken() -> None:
    case = Case(n_rows=1_500, d_model=12, n_sites=2)
    moments = [UpdateMoments(12), UpdateMoments(12)]
    assert stream(case, moments) > 0
    assert [site.of["delta"].n_rows for site in moments] == [1_500, 1_500]
    assert not moments[0].of["delta"].keeps_rows
    assert moments[0].of["delta"].geometry().shift_share > 0.5, "the synthetic update is mostly one shift"
    assert decompose(case, moments) > 0
    base, policy = synthetic_rows(3, 5, torch.Generator().manual_seed(0))
    assert base.shape == policy.shape == (3, 5)


def test_the_full_table_reaches_the_largest_model_and_says_what_was_multiplied() -> None:
    largest = FULL_CASES[-1]
    assert (largest.n_rows, largest.d_model, max(LAYERS)) == (10_000, 4096, 32)
    summary = {"stream_seconds": 2.0, "spectra_seconds": 3.0, "held_mb": 4.0, "peak_mb": 5.0}
    row = cost_row(largest, summary)
    assert row[:4] == ["4,096", "10,000", "2.00", "3.00*"]
    assert row[-2:] == ["≈ 165", "≈ 132"]
    measured = cost_row(Case(256, 256, n_sites=33, n_spectra=N_SPECTRA), {k: 33 * v for k, v in summary.items()})
    assert measured[-3:] == ["≈ 65.0", "= 165", "= 132"]
