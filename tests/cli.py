"""Runs the command line as a person would, in a process of its own, on a world small enough for a test."""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from launch.configuration import CONF, prepare_overrides
from tests.processes import HANGS, ROOT, Forked, Running, Worker, ranks, run_script, wait_for_all

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


def run_train(
    *arguments: str,
    timeout: float = HANGS,
    environment: Mapping[str, str | None] | None = None,
    before: Callable[[], object] | None = None,
) -> CompletedProcess[str]:
    """``python train.py …`` with output captured; see :class:`tests.processes.Running`."""
    return run_script("train.py", *arguments, before=before, environment=environment, timeout=timeout)


def run_train_on_two(
    *arguments: str,
    timeout: float = HANGS,
    environment: Mapping[str, str] | None = None,
    before_second: Callable[[], object] | None = None,
) -> list[CompletedProcess[str]]:
    """``python train.py …`` as torchrun starts it twice, forked: no second start of Python, which takes longer than the run.

    Args:
        arguments: of both.
        timeout: seconds, after which none may be left.
        environment: of both, beside torchrun's.
        before_second: called in the second process first.
    """
    started = [
        Running("train.py", *arguments, environment=known, before=before)
        for known, before in zip(ranks(environment), (None, before_second), strict=True)
    ]
    return wait_for_all(started, timeout)


def run_train_together(*arguments: str) -> CompletedProcess[str]:
    """The first of :func:`run_train_on_two`, where both end alike."""
    return _first_of(run_train_on_two(*arguments))


def _first_of(ended: Sequence[CompletedProcess[str]]) -> CompletedProcess[str]:
    """The process that speaks for both, which have to end alike."""
    first, second = ended
    assert second.returncode == first.returncode, second.stderr
    assert second.stdout == "", "only the first process speaks"
    return first


def run_train_by_torchrun(*arguments: str, timeout: float = HANGS) -> CompletedProcess[str]:
    """``torchrun --standalone --nproc_per_node=2 train.py …`` with output captured; what it starts is forked, as it is itself."""
    command = ("--standalone", "--nproc_per_node=2", str(ROOT / "train.py"), *arguments)
    return Forked(partial(_torchrun, command)).wait(timeout)


def _torchrun(command: Sequence[str]) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda self, args, env: Worker(args, env)  # type: ignore[method-assign,assignment,return-value]
    run.main(command)


def run_train_by_srun(*arguments: str, timeout: float = HANGS) -> CompletedProcess[str]:
    """Two tasks of one node, with the variables that SLURM gives each; the output and the exit code of the first."""
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    job |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost"}
    tasks = [
        Running("train.py", *arguments, environment=job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank})
        for rank in "01"
    ]
    return _first_of(wait_for_all(tasks, timeout))


def composed(*arguments: str) -> DictConfig:
    """The configuration of ``python train.py …``, composed in this process."""
    overrides = prepare_overrides(arguments, config_name="train")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=overrides)


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
