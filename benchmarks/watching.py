"""What does it cost to watch hidden states while a model trains?

    python benchmarks/watching.py [--quick]

Whole runs of conf/experiment/tiny_hh.yaml with the callbacks that watch hidden states (callbacks=geometry) and with none:
every run is a process of its own, and the two of a round take turns of a few optimizer steps, so that a slow minute of
the machine hits both.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file can be run from anywhere
from benchmarks import common
from benchmarks.common import SideResult, Spread, Worker
from benchmarks.watched_run import GRADIENTS, PROBE, RunSettings, prepare, turn_lengths
from tiltmeter.errors import UserError
from tiltmeter.threads import usable_cores

WATCHED, PLAIN = "geometry callbacks", "no callbacks"
CHOICES = {WATCHED: "geometry", PLAIN: "none"}
QUICK_SIZES = (48, 16, 16)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; what --quick changes is only a default."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    number = common.positive
    parser.add_argument("--quick", action="store_true", help="under a minute: runs of three steps")
    parser.add_argument(
        "--data", help="HH file or folder; default: harmless-base below $TILTMETER_SHARED, else a stand-in"
    )
    parser.add_argument("--rounds", type=number, help="runs of each side (default: 3; quick: 1)")
    parser.add_argument("--turns", type=number, help="turns that a run is cut into (default: 12; quick: 1)")
    parser.add_argument("--threads", type=number, default=usable_cores(), help="CPU threads of a side")
    options = parser.parse_args(arguments)
    for name, usual, quick in (("rounds", 3, 1), ("turns", 12, 1)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    return options


def run_round(i: int, settings: RunSettings, threads: int) -> dict[str, SideResult]:
    """One run of each side, interleaved."""
    folder = Path(settings.folder)
    workers = []
    for name, choice in CHOICES.items():
        mine = RunSettings(**{**settings.as_json(), "callbacks": choice, "run": f"{choice}_{i}"})
        log = folder / f"{mine.run}.log"
        workers.append(Worker(name, "benchmarks.watched_run", mine.as_json(), log=log, threads=threads))
    common.progress(f"round {i + 1}: one run of each side")
    return common.take_turns(workers, dict.fromkeys(CHOICES, len(settings.turns)))


def seconds_of(result: SideResult) -> float:
    """Of the whole run, without what comes before its first step."""
    return sum(result.seconds[1:])


def report_runs(rounds: Sequence[Mapping[str, SideResult]]) -> tuple[Spread, Spread]:
    """Print the comparison of whole runs; returns the overheads of time and of memory."""
    rows = []
    for name in CHOICES:
        results = [one[name] for one in rounds]
        figures = [
            Spread.of([seconds_of(r) for r in results]),
            Spread.of([float(r.summary["peak_mb"]) for r in results]),
            Spread.of([float(r.summary["peak_at_start_mb"]) for r in results]),
        ]
        rows.append([name, *map(str, figures), f"{results[0].summary['losses'][-1]:.9f}"])
    head = ["side", "seconds", "peak MB", "peak MB before the first step", "last loss"]
    common.print_table("Whole runs (min · median · max over rounds; peak MB of the whole process)", head, rows)
    time = Spread.of([seconds_of(one[WATCHED]) / seconds_of(one[PLAIN]) - 1 for one in rounds])
    memory = Spread.of([one[WATCHED].summary["peak_mb"] / one[PLAIN].summary["peak_mb"] - 1 for one in rounds])
    shares = [[name, *(f"{x:+.2%}" for x in spread)] for name, spread in (("time", time), ("peak memory", memory))]
    common.print_table("Overhead within a round", ["", "min", "median", "max"], shares)
    return time, memory


def report_parts(rounds: Sequence[Mapping[str, SideResult]]) -> None:
    """Print where the watched runs spent their extra time, by clocks around each part."""
    parts = [one[WATCHED].summary["callbacks"] for one in rounds]
    plain = statistics.median(seconds_of(one[PLAIN]) for one in rounds)
    names = sorted(parts[0], key=lambda name: (name not in (PROBE, GRADIENTS), name))
    rows = []
    for name in names:
        seconds = Spread.of([float(one.get(name, 0)) for one in parts])
        rows.append([name, str(seconds), f"{seconds.median / plain:.2%}"])
    total = Spread.of([sum(one.values()) for one in parts])
    rows.append(["all of them", str(total), f"{total.median / plain:.2%}"])
    title = "Where the extra time goes (each without what other rows name)"
    common.print_table(title, ["part", "seconds a run", "share of a run without callbacks"], rows)


def run(options: argparse.Namespace, folder: Path) -> None:
    """Compare, and print where the time goes."""
    machine = common.machine(options.threads)
    sizes = QUICK_SIZES if options.quick else None
    path, parts = prepare(folder, options.data, sizes)
    n_steps = parts.data.steps_per_epoch
    if options.turns > n_steps:
        raise UserError(f"--turns: a run has {n_steps} optimizer steps, which can't be cut into {options.turns} turns")
    settings = RunSettings(str(folder), "", "", path, turn_lengths(n_steps, options.turns), sizes)
    rounds = [run_round(i, settings, options.threads) for i in range(options.rounds)]
    losses = {tuple(result.summary["losses"]) for one in rounds for result in one.values()}
    counts = {name: len(split.pairs) for name, split in parts.data.splits.items()}
    source = parts.data.reports[0].source if path else "a stand-in of random words with the lengths of HH harmless-base"
    n_parameters = rounds[0][PLAIN].summary["n_parameters"]
    print(
        f"Machine: {machine}\nRun: experiment tiny_hh on {source}, {counts['train']} pairs in {n_steps} optimizer steps, "
        f"{counts['val']} to validate on, {counts['probe']} to probe; {n_parameters / 1e6:.1f} M parameters, random weights\n"
        f"{options.rounds} round(s) of one run a side, in {options.turns} interleaved turn(s); loss curves "
        f"{'are the same to the last digit' if len(losses) == 1 else 'DIFFER: watching changed the training'}"
    )
    time, memory = report_runs(rounds)
    report_parts(rounds)
    common.print_result(time_overhead=time.median, memory_overhead=memory.median)


def main() -> None:
    options = parse()
    with common.clear_errors(), tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))


if __name__ == "__main__":
    main()
