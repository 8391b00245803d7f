"""Rows F3, F4, F5 and F34 of the fault list: signals to a run of two processes, or of one from the command line."""

import os
from pathlib import Path

import pytest

from tests.cli import TINY, logged, only_run, run_train_on_two
from tests.processes import codes

pytestmark = pytest.mark.slow
JOB = (*TINY, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
JOB += ("logger=csv", "callbacks=none", "trainer.max_epochs=2", "trainer.enable_progress_bar=false")


def fake_scontrol(folder: Path) -> dict[str, str]:
    """A command that writes down what it was asked, in front of the path."""
    script = folder / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n', encoding="utf-8")
    script.chmod(0o755)
    return {"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "77"}


def test_a_signal_to_one_of_two_processes_stops_both_and_the_requeued_job_goes_on(tmp_path: Path) -> None:
    environment, root = fake_scontrol(tmp_path), f"runs_root={tmp_path / 'runs'}"
    ended = run_train_on_two(*JOB, root)
    assert codes(ended) == [0, 0], ended
    whole = only_run(tmp_path / "runs")
    fault = "+callbacks.fault={_target_:tests.faults.faulty.SignalInStep,step:1,rank:1,name:SIGUSR1}"
    ended = run_train_on_two(*JOB, root, fault, environment=environment)
    assert codes(ended) == [143, 143], ended
    (run,) = set(whole.parent.iterdir()) - {whole}
    last = run / "checkpoints" / "last.ckpt"
    stopped = f"tiltmeter: stopped by SIGUSR1 after step 2; go on with ckpt_path={last}\n"
    assert [(one.stdout + one.stderr).count(stopped) for one in ended] == [1, 0]
    assert (tmp_path / "asked").read_text(encoding="utf-8") == "requeue 77\n"
    assert len(logged(run, "train/loss")) == 2
    again = environment | {"SLURM_RESTART_COUNT": "1"}
    resumed = run_train_on_two(*JOB, root, environment=again)
    assert codes(resumed) == [0, 0], resumed
    assert set(whole.parent.iterdir()) == {whole, run}
    for name in ("step", "train/loss", "train/gradient_norm", "train/learning_rate", "val/loss"):
        assert logged(run, name) == logged(whole, name), name
    exported = [(folder / "aligned" / "model.safetensors").read_bytes() for folder in (run, whole)]
    assert exported[0] == exported[1]
