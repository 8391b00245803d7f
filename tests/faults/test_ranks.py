"""Rows F22, F23 and F28 of the fault list: processes that were started differently, have unequal shares, or nothing to do."""

import socket
from pathlib import Path

import pytest

from tests.cli import TINY, composed, run_train
from tests.processes import codes, run_on_ranks
from tiltmeter.files import write_text

pytestmark = pytest.mark.slow
JOB = (*TINY, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
JOB += ("logger=csv", "callbacks=none", "trainer.enable_progress_bar=false")
DIFFERENT = ("options", "data", "code", "checkpoint", "too few pairs")


def start_differently(rank: int, folder: Path) -> None:
    """Start the run five times, in the same two processes, of which the second one differs."""
    import launch.processes.agreement
    import launch.training
    from datamodules.preference import PreferenceDataModule

    load, digest, find = (
        PreferenceDataModule.load,
        launch.processes.agreement.code_digest,
        launch.training._checkpoint_to_resume,
    )

    def load_one_less(data: PreferenceDataModule) -> None:
        load(data)
        data.records["train"].pop()

    codes = []
    for what in DIFFERENT:
        other = what if rank else ""
        PreferenceDataModule.load = load_one_less if other == "data" else load  # type: ignore[method-assign]
        launch.processes.agreement.code_digest = (lambda: "sha256 another") if other == "code" else digest
        if other == "checkpoint":
            write_text(folder / "run" / "config.yaml", "model: {}\n")
            launch.training._checkpoint_to_resume = lambda *_: (folder / "run" / "checkpoints" / "last.ckpt", [], [])
        options = ["module.beta=0.2"] if other == "options" else []
        options += ["datamodule.pairs_per_step=1"] if what == "too few pairs" else []
        with pytest.raises(SystemExit) as ended:
            launch.training.train(composed(*JOB, f"runs_root={folder / what}", *options))
        codes.append(ended.value.code)
        launch.training._checkpoint_to_resume = find
    assert codes == [2] * len(DIFFERENT)


def test_processes_that_disagree_all_stop_before_training_and_the_first_one_says_why(tmp_path: Path) -> None:
    ended = run_on_ranks(start_differently, tmp_path)
    assert codes(ended) == [0, 0], ended
    spoken = [[line for line in one.stderr.splitlines() if line.startswith("tiltmeter:")] for one in ended]
    assert spoken[1] == []
    for line, words in zip(
        spoken[0],
        (
            "module.beta: process 0 has its default, process 1 has 0.2; start all processes with the same code",
            "data (train): process 0 has 90 pairs with sha256 ",
            "process 1 has sha256 another",
            "training: process 0 has the run from its beginning, process 1 has the run from a checkpoint",
            "datamodule.pairs_per_step=1: 2 processes share the pairs of a step; set it to 2 or more",
        ),
        strict=True,
    ):
        assert words in line
    assert "process 1 has 89 pairs" in spoken[0][1]
    assert not [path for path in tmp_path.rglob("metrics.csv") if "bases" not in path.parts], "the run never began"


def test_a_port_that_is_taken_is_one_line_and_nobody_is_left_waiting(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_train(*JOB, f"runs_root={tmp_path}", environment={"MASTER_PORT": port})
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"tiltmeter: MASTER_PORT: the processes can't meet at 127.0.0.1:{port} (")
