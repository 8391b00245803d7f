"""The process that others are forked from: one that has imported the libraries, for all workers of a whole run of the suite.

Imports nothing heavy: the process that starts the workers starts it too.
"""

import multiprocessing
import os
from multiprocessing import forkserver

PRELOADED = (
    "launch.training",
    "launch.analyzing",
    "transformers.models.llama.modeling_llama",
    "peft",
    "wandb",
    "torch._dynamo",
    "tests.warm",
)

_server = forkserver._forkserver  # type: ignore[attr-defined]


def start() -> str:
    """Start it, unless it runs, and wait until it has imported all; returns its address. It ends with this process.

    On a fresh machine the libraries are compiled then, and only read by all that come after.
    """
    if _server._forkserver_address is None:
        _server.set_forkserver_preload(list(PRELOADED))
        first = multiprocessing.get_context("forkserver").Process(target=int)
        first.start()
        first.join()
    address: str = _server._forkserver_address
    return address


def join(address: str) -> None:
    """Fork from the one that another process has started, rather than from one of this process."""
    _server._forkserver_address = address
    _server._forkserver_alive_fd = os.open(
        os.devnull, os.O_RDONLY
    )  # handed to forked processes; the true one is its owner's
    _server.ensure_running = lambda: None
