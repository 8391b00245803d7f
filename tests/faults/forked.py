"""Whole training runs in forked processes of their own, which may be killed: one start of Python serves all of them.

``python -m tests.faults.forked`` imports the program once and forks a child for every line of JSON on its input; the
child runs ``train.py`` with the arguments of that line and dies where the line says so.
"""

import json
import os
import runpy
import select
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

from tests.processes import ROOT

KILLED = -9


@dataclass
class Ended:
    """How a run ended."""

    code: int
    """Exit code, negative for a signal."""
    stdout: str
    stderr: str


class Forkery:
    """Starts runs (``with``); each in a fresh child of a process that has imported everything and computed nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._n = 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forked"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def __enter__(self) -> "Forkery":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate(timeout=60)  # the end of its input ends it

    def run(self, *arguments: str, timeout: float = 240, **options: Any) -> Ended:
        """One run to its end; see :func:`together`."""
        return self.together([(arguments, options)], timeout=timeout)[0]

    def two_ranks(
        self, *arguments: str, fault_of_second: Mapping[str, Any] | None = None, **options: Any
    ) -> list[Ended]:
        """One run by two processes over gloo."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        faults = ({}, fault_of_second or {})
        return self.together([(arguments, {"rank": i, "port": port, "fault": faults[i]}) for i in range(2)], **options)

    def together(self, runs: list[tuple[tuple[str, ...], Mapping[str, Any]]], *, timeout: float = 240) -> list[Ended]:
        """Several runs side by side, to the end of all of them.

        Args:
            runs: of each its command line, and options: ``fault`` (names of :data:`tests.faults.faults.FAULTS` and their
                arguments), ``rank`` and ``port`` of one of several processes.
            timeout: seconds, after which none may be left.
        """
        jobs = []
        for arguments, options in runs:
            self._n += 1
            jobs.append({"arguments": arguments, "out": str(self.folder / f"run-{self._n}"), **options})
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(jobs) + "\n")
        self._server.stdin.flush()
        ready, _, _ = select.select([self._server.stdout], [], [], timeout)
        if not ready:
            self._server.kill()
            raise TimeoutError(f"still running after {timeout} s: {[job['arguments'] for job in jobs]}")
        codes = json.loads(self._server.stdout.readline())
        return [
            Ended(code, *(Path(f"{job['out']}.{name}").read_text(encoding="utf-8") for name in ("out", "err")))
            for code, job in zip(codes, jobs, strict=True)
        ]


def _serve() -> None:
    """Parent of all runs; must not compute, for threads of a pool don't survive a fork."""
    import wandb  # noqa: F401 (imported once, before any fork)

    import launch.training  # noqa: F401

    for line in sys.stdin:
        children = [_fork(job) for job in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)  # noqa: T201


def _fork(job: Mapping[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{job['out']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            _become_rank(job.get("rank"), job.get("port"))
            code = _train(job)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def _become_rank(rank: int | None, port: int | None) -> None:
    """One of the processes of a job that something else started, as torchrun or srun would."""
    if rank is not None:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rank_zero_only.rank = rank  # read from the environment when Lightning was imported


def _train(job: Mapping[str, Any]) -> int:
    from tests.faults.faults import FAULTS

    for name, argument in job.get("fault", {}).items():
        install: Callable[[Any], object] = FAULTS[name]
        install(argument)
    sys.argv = [str(ROOT / "train.py"), *job["arguments"]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


if __name__ == "__main__":
    _serve()
    os._exit(0)  # nothing here needs tidying up, which takes seconds
