"""SLURM jobs that go on after they were stopped: each puts itself back into the queue, and finds its run again."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGUSR1

from omegaconf import DictConfig

from analysis.open.runs import start_of
from launch.resuming import check_same_run, keep_chat_date
from launch.run_folder import is_first_process
from tiltmeter.checkpoint_files import newest_valid
from tiltmeter.errors import Preempted, UserError
from tiltmeter.files import write_text

_JOB_FILE = "slurm_job"
"""File of a run folder: the job that writes it."""


def job_id() -> str | None:
    """The job's id, with the task of an array; None outside SLURM."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def note_job(run_dir: Path) -> None:
    """Say in the run folder whose run it is, for :func:`checkpoint_of_this_job`; nothing outside SLURM."""
    if job := job_id():
        write_text(run_dir / _JOB_FILE, job)


def checkpoint_of_this_job(config: DictConfig) -> Path | None:
    """Checkpoint of a job that SLURM started again: of its newest run under these settings that saved something.

    None: the job has not been started before (``SLURM_RESTART_COUNT``), or had not come as far.
    """
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) == 0 or (job := job_id()) is None:
        return None
    files = Path(config.runs_root, config.name).glob(f"*/{_JOB_FILE}")
    for file in sorted(files, key=lambda file: start_of(file.parent), reverse=True):
        if file.read_text(encoding="utf-8") == job:
            checkpoint, _ = newest_valid(file.parent / "checkpoints", contents=is_first_process())
            if checkpoint is not None and _is_same(checkpoint, config):
                return checkpoint
    return None


def _is_same(checkpoint: Path, config: DictConfig) -> bool:
    """A job that sweeps has runs of other settings too."""
    settings = config.copy()
    keep_chat_date(checkpoint, settings)  # requeued after midnight, it is still the same run
    try:
        check_same_run(checkpoint, settings)
    except UserError:
        return False
    return True


@contextmanager
def requeued_when_asked() -> Iterator[None]:
    """Put the job back into the queue when SIGUSR1 ended it, which is how sbatch announces the end (``--signal=USR1@90``).

    Not after SIGTERM: SLURM puts back what it preempts, and a cancelled job is to stay cancelled.
    """
    try:
        yield
    except Preempted as stop:
        if stop.signal == SIGUSR1 and (job := job_id()) and is_first_process():
            _requeue(job)
        raise


def _requeue(job: str) -> None:
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        print(f"tiltmeter: scontrol requeue {job}: {said}; start the job again by hand", file=sys.stderr)  # noqa: T201
