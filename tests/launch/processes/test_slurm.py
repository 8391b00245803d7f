import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.processes.slurm import checkpoint_of_this_job, job_id, note_job, requeued_when_asked
from launch.resuming import SETTINGS, settings_sha256
from launch.run_folder import write_config
from tiltmeter.checkpoint_files import commit
from tiltmeter.errors import Preempted


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a fake scontrol was asked; it fails for job 13."""
    script, log = tmp_path / "bin" / "scontrol", tmp_path / "asked"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ "$2" != 13 ] || {{ echo no such job >&2; exit 1; }}\n')
    script.chmod(0o755)
    log.touch()
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return log


def stop_by(number: signal.Signals) -> None:
    with pytest.raises(Preempted), requeued_when_asked():
        raise Preempted(number)


def test_a_job_is_requeued_once_and_only_when_its_end_was_announced(
    asked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_by(signal.SIGTERM)
    assert asked.read_text() == ""
    stop_by(signal.SIGUSR1)
    assert asked.read_text() == "requeue 77\n"
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    stop_by(signal.SIGUSR1)
    assert capsys.readouterr().err == "tiltmeter: scontrol requeue 13: no such job; start the job again by hand\n"
    monkeypatch.delenv("SLURM_JOB_ID")
    stop_by(signal.SIGUSR1)
    assert len(asked.read_text().splitlines()) == 2, "outside SLURM there is nothing to ask"


def test_tasks_of_an_array_are_jobs_of_their_own(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert job_id() == "70_3"
    stop_by(signal.SIGUSR1)
    assert asked.read_text() == "requeue 70_3\n"


def test_a_job_started_again_finds_its_newest_run_of_these_settings(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = OmegaConf.create(
        {"runs_root": str(tmp_path / "runs"), "name": "x", "seed": 1, "allow_config_change": False}
    )
    other = OmegaConf.create(
        {"runs_root": str(tmp_path / "runs"), "name": "x", "seed": 2, "allow_config_change": False}
    )
    for day, job, made_with, has_saved in (
        ("2026-01-01", "77", config, True),
        ("2026-01-02", "77", config, True),
        ("2026-01-03", "77", config, False),
        ("2026-01-04", "77", other, True),
        ("2026-01-05", "78", config, True),
    ):
        run = tmp_path / "runs" / "x" / f"{day}_00-00-00"
        run.mkdir(parents=True)
        write_config(run, made_with)
        monkeypatch.setenv("SLURM_JOB_ID", job)
        note_job(run)
        if has_saved:
            made_by = {SETTINGS: settings_sha256(made_with)}
            commit(
                run / "checkpoints" / "last.ckpt", lambda path: path.write_bytes(b"weights"), step=3, made_by=made_by
            )
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert checkpoint_of_this_job(config) is None, "the first start"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert (
        checkpoint_of_this_job(config)
        == tmp_path / "runs" / "x" / "2026-01-02_00-00-00" / "checkpoints" / "last-step-000003.ckpt"
    )
    monkeypatch.setenv("SLURM_JOB_ID", "79")
    assert checkpoint_of_this_job(config) is None
    monkeypatch.delenv("SLURM_JOB_ID")
    assert checkpoint_of_this_job(config) is None
