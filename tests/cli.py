"""Runs the command line as a person would, in a process of its own, on a world small enough for a test."""

import csv
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TINY = (
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=2",
    "model.vocab_size=300",
    "data.n_prompts=120",
    "datamodule.val_pairs=20",
    "datamodule.probe_pairs=10",
    "base.max_epochs=1",
    "decoding.max_new_tokens=8",
)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run_train(
    *arguments: str,
    timeout: int = 240,
    python: Sequence[str] = (sys.executable,),
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """``python train.py …`` with output captured.

    Args:
        python: what runs the file, :data:`TORCHRUN` for example.
        variables: additional environment.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT", "PL_GLOBAL_SEED"):
        environment.pop(name, None)
    return subprocess.run(
        [*python, str(ROOT / "train.py"), *arguments],
        cwd=ROOT,
        env=environment | (variables or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_train_by_srun(*arguments: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """Two tasks of one node, with the variables that SLURM gives each; the output and the exit code of the first."""
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    job |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost"}
    with ThreadPoolExecutor(2) as pool:
        tasks = [
            pool.submit(
                run_train,
                *arguments,
                timeout=timeout,
                variables=job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            )
            for rank in range(2)
        ]
    first, second = (task.result() for task in tasks)
    assert second.returncode == first.returncode, second.stderr
    assert second.stdout == "", "only the first process speaks"
    return first


def only_run(root: Path, experiment: str = "tiny_synthetic") -> Path:
    """The one run folder below a root."""
    (folder,) = sorted((root / experiment).iterdir())
    return folder


def metrics_of(run: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def logged(run: Path, name: str) -> list[float]:
    """One metric over time, where it was logged."""
    return [float(row[name]) for row in metrics_of(run) if row.get(name)]
