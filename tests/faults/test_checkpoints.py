"""F7, F8, F9, F25, F27, F33 from the command line: bad checkpoints and folders end with one line, or are gone around."""

import shutil
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from launch.processes.run_lock import run_lock
from tests.cli import TINY, logged, metrics_of, only_run, run_train
from tests.faults.faults import full_disk
from tests.processes import contents
from tiltmeter.checkpoint_files import commit, verify

pytestmark = pytest.mark.slow
RUN = (
    *TINY,
    "callbacks=none",
    "logger=csv",
    "datamodule.pairs_per_step=16",
    "trainer.max_epochs=1",  # of 6 steps
    "trainer.val_check_interval=2",  # a checkpoint each time,
    "checkpoint.save_top_k=0",  # and no second one of the best step
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def started(root: Path) -> CompletedProcess[str]:
    """A run whose disk was full at its second checkpoint."""
    return run_train(*RUN, f"runs_root={root}", before=partial(full_disk, 4))


@pytest.fixture(scope="module")
def run(root: Path, started: CompletedProcess[str]) -> Path:
    assert started.returncode == 0, started.stderr
    return only_run(root)


def refused(root: Path, run: Path, *arguments: str) -> str:
    """The one line of a run that was refused, which changed nothing."""
    before = contents(run)
    ended = run_train(*RUN, f"runs_root={root}", *arguments)
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.strip().splitlines()
    assert contents(run) == before
    return line


def test_f8_a_full_disk_is_said_and_counted_and_costs_that_checkpoint_only(
    started: CompletedProcess[str], run: Path
) -> None:
    assert "last.ckpt: could not be written (No space left on device" in started.stderr
    assert "training goes on without it" in started.stderr
    alarms = [row["step"] for row in metrics_of(run) if row["alarm/checkpoint"]]
    assert set(alarms) == {"3"}
    assert len(logged(run, "train/loss")) == 6
    steps = sorted(verify(path).step for path in (run / "checkpoints").glob("*-step-??????.ckpt"))
    assert set(steps) == {2, 6}
    assert verify(run / "checkpoints" / "last.ckpt").step == 6
    assert not list((run / "checkpoints").glob(".*"))


def test_f25_other_settings_are_refused_with_the_difference(root: Path, run: Path) -> None:
    line = refused(root, run, "ckpt_path=last", "module.beta=0.2", "module.loss=ipo")
    assert "module.beta was None, now 0.2; module.loss was None, now ipo" in line


def test_f27_a_folder_in_which_another_process_trains_is_refused(root: Path, run: Path) -> None:
    with run_lock(run):
        line = refused(root, run, "ckpt_path=last")
    assert line.startswith(f"tiltmeter: {run}: process ")
    assert "is training in this run folder" in line


def test_f9_a_place_that_cannot_be_written_to_is_known_at_once(root: Path, run: Path) -> None:
    assert "runs_root: cannot write to /sys" in refused(root, run, "runs_root=/sys/runs")


def test_f33_a_hostile_checkpoint_with_a_perfect_manifest_is_refused(root: Path, run: Path) -> None:
    canary = root / "canary"
    hostile = {"global_step": 5, "hyper_parameters": {"_instantiator": "os.mkdir", "path": str(canary)}}
    made_by = verify(run / "checkpoints" / "last.ckpt").made_by
    link = shutil.copytree(run, root / "given") / "checkpoints" / "last.ckpt"
    link.unlink()
    commit(link, lambda path: torch.save(hostile, path), step=5, made_by=made_by)
    ended = run_train(*RUN, f"runs_root={root}", f"ckpt_path={link}")
    assert ended.returncode == 2
    (line,) = ended.stderr.strip().splitlines()
    assert "last-step-000005.ckpt holds hyper_parameters, which no run writes here" in line
    assert not canary.exists()


def test_f7_f25_damage_is_refused_by_name_gone_around_by_last_and_changed_settings_can_be_allowed(
    root: Path, run: Path
) -> None:
    newest = run / "checkpoints" / "last-step-000006.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    line = refused(root, run, f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}")
    assert f"{newest} has changed since it was written" in line
    before = logged(run, "train/loss")
    resumed = run_train(*RUN, f"runs_root={root}", "ckpt_path=last", "module.beta=0.2", "allow_config_change=true")
    assert resumed.returncode == 0, resumed.stderr
    assert f"Skipped: {newest} has changed since it was written" in resumed.stdout
    assert "Changed: module.beta was None, now 0.2" in resumed.stdout
    assert [a == b for a, b in zip(logged(run, "train/loss"), before, strict=True)] == [True] * 2 + [False] * 4
    assert verify(run / "checkpoints" / "last.ckpt").step == 6
