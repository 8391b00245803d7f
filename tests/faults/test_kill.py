"""F1, F2, F6, F24: runs that are killed at any moment and resumed are the runs that were not."""

import hashlib
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.cli import TINY, logged, metrics_of, only_run, run_train, run_train_on_two
from tests.faults.faults import kill_before_step, kill_inside_step, kill_while_saving

pytestmark = pytest.mark.slow
RUN = (
    *TINY,
    "callbacks=none",
    "logger=csv",
    "datamodule.pairs_per_step=8",
    "datamodule.tokens_per_micro_batch=400",  # several micro-batches a step
    "trainer.max_epochs=2",  # of 12 steps each
    "trainer.val_check_interval=3",
    "last_checkpoint.every_n_train_steps=2",  # between validations too, and at the end of the epoch
)
TWO_RANKS = (
    "trainer=ddp",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.precision=32-true",
    "trainer.max_epochs=1",
)
N_STEPS = 24
KILLED = -signal.SIGKILL
OF_THE_CLOCK = ("throughput/tokens_per_second", "throughput/pairs_per_second")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def golden(place: Path) -> Path:
    """A run that nothing happens to."""
    finished(run_train(*RUN, root(place, "golden")))
    return only_run(place / "golden")


def root(place: Path, name: str) -> str:
    """Runs of their own folder, and the base of all."""
    folder = place / name
    shared = place / "cache"
    shared.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    if not (folder / "cache").exists():
        (folder / "cache").symlink_to(shared)
    return f"runs_root={folder}"


def finished(*ended: CompletedProcess[str]) -> None:
    for one in ended:
        assert one.returncode == 0, one.stderr


def recorded(run: Path) -> list[dict[str, Any]]:
    """metrics.csv to the last digit, without what the clock says."""
    return [{k: v for k, v in row.items() if k not in OF_THE_CLOCK} for row in metrics_of(run)]


def sha256_of_weights(run: Path) -> str:
    return hashlib.sha256((run / "aligned" / "model.safetensors").read_bytes()).hexdigest()


def test_f1_f6_killed_at_random_steps_and_inside_a_save_a_run_ends_as_if_nothing_had_happened(
    place: Path, golden: Path
) -> None:
    steps = sorted(random.Random(3).sample(range(1, N_STEPS), 5))
    assert N_STEPS // 2 in steps, "one of them where an epoch ends: what is resumed there is killed and resumed again"
    faults = [partial(kill_inside_step if step % 4 else kill_before_step, step) for step in steps]
    faults.append(partial(kill_while_saving, steps[-1] // 2 * 2 + 2))
    where = root(place, "killed")
    for i, fault in enumerate(faults):
        killed = run_train(*RUN, where, *(["ckpt_path=last"] if i else []), before=fault)
        assert killed.returncode == KILLED, (fault, killed.stderr)
    last = run_train(*RUN, where, "ckpt_path=last")
    finished(last)
    run = only_run(place / "killed")
    assert ".partial-" in last.stdout.split("Removed: ")[1].splitlines()[0]
    assert "Lock taken over: process" in last.stdout
    assert recorded(run) == recorded(golden)
    assert sha256_of_weights(run) == sha256_of_weights(golden)
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in golden.iterdir()), (
        "no lock, nothing half done"
    )


def test_f2_f24_one_of_two_ranks_killed_ends_both_and_they_go_on_alike_or_alone(place: Path) -> None:
    arguments = (*RUN, *TWO_RANKS)
    finished(*run_train_on_two(*arguments, root(place, "two")))
    whole = only_run(place / "two")

    first, second = run_train_on_two(*arguments, root(place, "one_dies"), before_second=partial(kill_inside_step, 7))
    assert second.returncode == KILLED
    assert first.returncode > 0, "the peer notices at once, not after the half hour that gloo waits for a message"
    part = only_run(place / "one_dies")
    alone = place / "alone" / "tiny_synthetic" / part.name
    root(place, "alone")
    shutil.copytree(part, alone, symlinks=True)

    finished(*run_train_on_two(*arguments, root(place, "one_dies"), "ckpt_path=last"))
    assert recorded(part) == recorded(whole)
    assert sha256_of_weights(part) == sha256_of_weights(whole)

    changed = (
        "trainer.max_epochs=1",
        "datamodule.tokens_per_micro_batch=700",
        root(place, "alone"),
        "ckpt_path=last",
    )
    resumed = run_train(*RUN, *changed)
    finished(resumed)
    assert "Processes: 1 now, 2 when the checkpoint was saved" in resumed.stdout
    assert "Changed: datamodule.tokens_per_micro_batch was 400, now 700 (the same steps" in resumed.stdout
    assert logged(alone, "step") == logged(whole, "step")
    for name in ("train/loss", "train/logps/chosen", "val/loss"):
        assert logged(alone, name) == pytest.approx(logged(whole, name), rel=1e-5, abs=1e-5), name
