"""Python programs in processes of their own, forked from one that has imported the libraries already.

Importing Lightning and what a run needs takes longer than most runs of the suite do; a forked process has it for nothing. All
else is as if ``python SCRIPT ARGUMENTS`` had been called: arguments, environment, folder, output, exit code and process id.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

from launch.processes.run_lock import LOCK
from tests import fork_server
from tests.fork_server import PRELOADED
from tiltmeter.files import sha256_of

ROOT = Path(__file__).resolve().parent.parent
N_RANKS = 2
HANGS = 3600.0
"""Seconds after which a process or a thread hangs; however busy the machine is, nothing of the suite takes so long."""
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(list(PRELOADED))
_PER_PROCESS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
"""What a launcher says to one process, which another run in this one may have left behind."""


class Forked:
    """A function called in a process of its own.

    Args:
        work: can be pickled; its end is that of a script, also where it raises.
        folder: it works in; None: the root.
        environment: beside the one of this process, without those of value None; one thread and a terminal of 160 columns
            are set already.
    """

    def __init__(
        self,
        work: Callable[[], object],
        *,
        folder: Path | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        self.work = work
        self._said = Path(tempfile.mkdtemp())
        self.stdout, self.stderr = self._said / "stdout", self._said / "stderr"
        kept = {name: value for name, value in os.environ.items() if name not in _PER_PROCESS}
        asked = kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"} | dict(environment or {})
        known = {name: value for name, value in asked.items() if value is not None}
        place = (str(folder or ROOT), known, str(self.stdout), str(self.stderr))
        self._process = _forks.Process(target=_run, args=(work, *place), daemon=False)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def send_signal(self, number: signal.Signals) -> None:
        """To this process alone, not to those that it started."""
        os.kill(self.pid, number)

    def is_running(self) -> bool:
        """Not ended yet."""
        return self._process.is_alive()

    def wait(self, timeout: float) -> CompletedProcess[str]:
        """Output and exit code, once it has ended; minus the signal's number where one ended it. To be called once.

        Raises:
            TimeoutExpired: it had to be killed after so many seconds.
        """
        self._process.join(max(timeout, 0))
        in_time = not self._process.is_alive()
        self._process.kill()
        self._process.join()
        said = [path.read_text(encoding="utf-8", errors="replace") for path in (self.stdout, self.stderr)]
        shutil.rmtree(self._said)
        if not in_time:
            raise TimeoutExpired(str(self.work), timeout, *said)
        code = self._process.exitcode
        assert code is not None
        return CompletedProcess(self.work, code, *said)


class Running(Forked):
    """A started script.

    Args:
        script: below the root of the project.
        arguments: of its command line.
        before: called in its process first, a fault to be installed for one; can be pickled.
        folder: as of :class:`Forked`.
        environment: likewise.
    """

    def __init__(
        self,
        script: str,
        *arguments: str,
        before: Callable[[], object] | None = None,
        folder: Path | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        work = partial(_run_script, str(ROOT / script), *arguments, before=before)
        super().__init__(work, folder=folder, environment=environment)


class Worker:
    """What a launcher in a forked process needs of ``subprocess.Popen``: a script that is forked as well, from the same process.

    It says what it says where its launcher does, and leads a session of its own.

    Args:
        command: Python, its flags, the script and its arguments.
        environment: all of it.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        script = next(i for i, word in enumerate(command) if word.endswith(".py"))
        work = partial(_run_script, *command[script:], before=os.setsid)
        said = (os.readlink(f"/proc/self/fd/{number}") for number in (1, 2))  # noqa: PTH115
        address: Any = forkserver._forkserver  # type: ignore[attr-defined]
        fork_server.join(address._forkserver_address)
        self._process = _forks.Process(target=_run, args=(work, str(Path.cwd()), dict(environment), *said))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Exit code, once it has ended."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        """Exit code, when it has ended."""
        self._process.join(timeout)
        return self._process.exitcode


def run_script(
    script: str,
    *arguments: str,
    before: Callable[[], object] | None = None,
    folder: Path | None = None,
    environment: Mapping[str, str | None] | None = None,
    timeout: float = HANGS,
) -> CompletedProcess[str]:
    """``python SCRIPT …`` to its end, with output captured; see :class:`Running`."""
    return Running(script, *arguments, before=before, folder=folder, environment=environment).wait(timeout)


def run_on_ranks(
    function: Callable[..., object],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    timeout: float = HANGS,
) -> list[CompletedProcess[str]]:
    """Call ``function(rank, *arguments)`` in two processes, to the end of both; see :class:`Forked` and :func:`wait_for_all`."""
    started = [
        Forked(partial(function, rank, *arguments), environment=known) for rank, known in enumerate(ranks(environment))
    ]
    return wait_for_all(started, timeout)


def ranks(environment: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    """What torchrun says to each of two processes on one machine, beside the environment given; their port was free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    job |= {"WORLD_SIZE": str(N_RANKS), "LOCAL_WORLD_SIZE": str(N_RANKS), **(environment or {})}
    return [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(N_RANKS)]


def wait_for_all(started: Sequence[Forked], timeout: float) -> list[CompletedProcess[str]]:
    """Output and exit code of each.

    Raises:
        TimeoutExpired: not all had ended after so many seconds; none is left running.
    """
    end, ended, late = time.monotonic() + timeout, [], None
    for process in started:
        try:
            ended.append(process.wait(end - time.monotonic()))
        except TimeoutExpired as error:
            late = late or error
    if late is not None:
        raise late
    return ended


def contents(folder: Path) -> dict[str, str]:
    """Every file and link of a folder: its path, and the sha256 of its bytes or what it points to.

    A lock's file is not opened: to close it again would free the lock, where this process holds it.
    """
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    links = {name: str(path.readlink()) for name, path in found.items() if path.is_symlink()}
    files = {name: path for name, path in found.items() if path.is_file() and name not in links}
    return links | {name: "" if path.name == LOCK else sha256_of(path) for name, path in files.items()}


def codes(ended: Sequence[CompletedProcess[str]]) -> list[int]:
    """Exit codes."""
    return [one.returncode for one in ended]


def _run(work: Callable[[], object], folder: str, known: dict[str, str], stdout: str, stderr: str) -> None:
    """In the forked process: become one that was started for this alone."""
    gc.freeze()  # a collection would copy every page of what was imported before the fork
    for number, path in ((0, os.devnull), (1, stdout), (2, stderr)):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(known)
    os.chdir(folder)
    torch.set_num_threads(int(known["OMP_NUM_THREADS"]))  # which was read when torch was imported
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    atexit._clear()  # folders that libraries made on import are not this process's to remove
    for inherited in list(weakref.finalize._registry):
        inherited.atexit = False
    weakref.finalize._registered_with_atexit = False
    rank_zero_only.rank = _get_rank() or 0  # as it would be when Lightning is imported
    try:
        work()
    finally:
        atexit._run_exitfuncs()


def _run_script(path: str, *arguments: str, before: Callable[[], object] | None) -> None:
    """In the forked process: ``python SCRIPT …``."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    if before is not None:
        before()
    runpy.run_path(path, run_name="__main__")
