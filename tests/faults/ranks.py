"""Two processes of one run, as torchrun starts them, without its price: both are forked from a server that has imported torch."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from launch.configuration import CONF, prepare_overrides

N_RANKS = 2
_PRELOADED = ("lightning.pytorch", "transformers.models.llama.modeling_llama", "peft", "launch.training")


def run_ranks(
    function: Callable[..., object],
    *arguments: Any,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    limit: float = 120.0,
) -> list[int | None]:
    """Call ``function(rank, *arguments)`` in two processes; returns their exit codes, None for one that hung.

    What they print lies in ``folder/0.txt`` and ``folder/1.txt``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_as_rank, args=(rank, port, folder, environment or {}, function, arguments))
        for rank in range(N_RANKS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(limit)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    return [None if process in hung else process.exitcode for process in processes]


def said(folder: Path) -> list[str]:
    """What each rank printed, standard error included."""
    return [(folder / f"{rank}.txt").read_text(encoding="utf-8") for rank in range(N_RANKS)]


def composed(*arguments: str) -> DictConfig:
    """The configuration of ``python train.py …``."""
    overrides = prepare_overrides(arguments, config_name="train")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=overrides)


def train_on_rank(rank: int, *arguments: str) -> None:
    """``python train.py …`` on one of them."""
    from launch.training import train

    train(composed(*arguments))


def _as_rank(
    rank: int,
    port: int,
    folder: Path,
    environment: Mapping[str, str],
    function: Callable[..., object],
    arguments: Sequence[Any],
) -> None:
    output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ |= {
        **environment,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(N_RANKS),
        "LOCAL_WORLD_SIZE": str(N_RANKS),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    import torch
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    torch.set_num_threads(1)
    rank_zero_only.rank = rank  # which Lightning reads from the environment when it is imported
    try:
        function(rank, *arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
