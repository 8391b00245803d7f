"""What do two processes cost, and do they compute what one does? One process beside two by DDP and two by FSDP2, on one machine.

    python benchmarks/processes.py [--quick] [--data DIR]

Whole runs of train.py (conf/experiment/tiny_hh.yaml, float32, hidden states watched), all from one base, in rotation; two
processes have half of one's threads each. Losses and geometry of every step are compared with one process's; times are those
of training steps alone.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file can be run from anywhere
from benchmarks import common
from benchmarks.common import Spread
from tiltmeter.errors import UserError
from tiltmeter.metric_names import find
from tiltmeter.threads import usable_cores

ONE = "one process"
SIDES: Mapping[str, tuple[str, ...]] = {
    ONE: (),
    "ddp": ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"),
    "fsdp": ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"),
}
COMMON = ("logger=csv", "callbacks=geometry", "trainer.enable_progress_bar=false", "trainer.enable_checkpointing=false")
QUICK = (
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.vocab_size=300",
    "data.n_prompts=120",
    "datamodule.val_pairs=20",
    "datamodule.probe_pairs=10",
    "base.max_epochs=1",
)
GEOMETRY = {
    *("projection", "hyperplane", "spectral_entropy", "effective_rank", "top1_energy", "shift_share", "sigma_ratio"),
    "mean_cosine",
}
WARM_UP = 2
"""First steps that aren't timed."""


class Run(NamedTuple):
    """What metrics.csv of a run says."""

    columns: frozenset[str]
    losses: list[float]
    geometry: dict[tuple[str, str], float]
    """(column, step) → value."""
    seconds: float
    """A pair in training steps, mean."""


def read_run(folder: Path) -> Run:
    """The figures of a finished run."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    geometry = {
        (name, row["step"]): float(value)
        for row in rows
        for name, value in row.items()
        if value and (found := find(name)) and found.metric.family in GEOMETRY
    }
    speeds = [float(row["throughput/pairs_per_second"]) for row in rows if row.get("throughput/pairs_per_second")]
    timed = speeds[WARM_UP:]
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    return Run(frozenset(rows[0]), losses, geometry, sum(1 / speed for speed in timed) / len(timed))


def train(side: str, options: argparse.Namespace, root: Path, n_steps: int) -> Run:
    """One run of a side; its own process, as a person would start it."""
    experiment = ["experiment=tiny_hh", f"data.path={options.data}"] if options.data else QUICK
    steps = (f"trainer.max_steps={n_steps}", "trainer.max_epochs=-1", "trainer.val_check_interval=1.0")
    threads = options.threads if side == ONE else max(1, options.threads // 2)
    command = [
        sys.executable,
        str(common.ROOT / "train.py"),
        *experiment,
        *COMMON,
        *steps,
        *SIDES[side],
        f"runs_root={root}",
    ]
    before = set(root.glob("tiny_*/*"))
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{side}: {(done.stderr.strip() or 'it printed nothing').splitlines()[-1][:300]}")
    (folder,) = set(root.glob("tiny_*/*")) - before
    return read_run(folder)


def largest_difference(a: Run, b: Run) -> tuple[float, float]:
    """Of a step's loss, and of a geometry metric, relative to 1 + its size."""
    losses = max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))
    if a.geometry.keys() != b.geometry.keys():
        raise UserError("geometry: the runs logged it at other steps or under other names")
    shared = ((value, b.geometry[key]) for key, value in a.geometry.items())
    return losses, max((abs(x - y) / (1 + abs(x)) for x, y in shared), default=0.0)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; what --quick changes is only a default."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny synthetic world, five steps")
    parser.add_argument("--data", help="HH file or folder; default: the synthetic world")
    parser.add_argument("--steps", type=common.positive, help="optimizer steps (default: 100; quick: 5)")
    parser.add_argument("--rounds", type=common.positive, default=1, help="runs of each side")
    parser.add_argument("--threads", type=common.positive, default=usable_cores(), help="CPU threads of a side in all")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (5 if options.quick else 100)
    options.data = None if options.quick else options.data
    return options


def run(options: argparse.Namespace, root: Path) -> None:
    """All rounds, then both tables."""
    print(f"Machine: {common.machine(options.threads)}")
    common.progress("the base, and the reference log-probs that all runs share")
    train(ONE, options, root, options.steps)
    rounds: list[dict[str, Run]] = []
    for i in range(options.rounds):
        names = [*list(SIDES)[i % len(SIDES) :], *list(SIDES)[: i % len(SIDES)]]
        common.progress(f"round {i + 1}: one run of each side")
        rounds.append({name: train(name, options, root, options.steps) for name in names})
    rows, result = [], {}
    for name in SIDES:
        seconds = Spread.of([one[name].seconds for one in rounds])
        overhead = Spread.of([one[name].seconds / one[ONE].seconds - 1 for one in rounds])
        loss, geometry = map(max, zip(*(largest_difference(one[ONE], one[name]) for one in rounds), strict=True))
        same = all(one[name].columns == one[ONE].columns for one in rounds)
        ratio = " · ".join(f"{x:+.1%}" for x in overhead)
        rows.append([name, str(seconds), ratio, f"{loss:.2g}", f"{geometry:.2g}", "yes" if same else "NO"])
        if name != ONE:
            result |= {f"{name}_overhead": overhead.median, f"{name}_loss_difference": loss}
            result |= {f"{name}_geometry_difference": geometry, f"{name}_same_columns": float(same)}
    head = [
        "side",
        "seconds a pair",
        "more than one process",
        "loss, largest difference",
        "geometry, relative",
        "same columns",
    ]
    title = f"{options.steps} optimizer steps, {options.threads} threads in all (min · median · max over {options.rounds} round(s))"
    common.print_table(title, head, rows)
    common.print_result(**result)


def main() -> None:
    options = parse()
    with common.clear_errors(), tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))


if __name__ == "__main__":
    main()
