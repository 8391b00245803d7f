"""Whole training runs in forked processes of their own, which may be killed: one start of Python serves all of them.

``python -m tests.faults.forked`` imports the program once and forks a child for every line of JSON on its input; the
child runs ``train.py`` with the arguments of that line and dies where the line says so.
"""

import json
import os
import runpy
import select
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.cli import ROOT

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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)

    def run(self, *arguments: str, timeout: float = 120, **options: Any) -> Ended:
        """One run to its end; see :func:`together`."""
        return self.together([(arguments, options)], timeout=timeout)[0]

    def together(self, runs: list[tuple[tuple[str, ...], Mapping[str, Any]]], *, timeout: float = 120) -> list[Ended]:
        """Several runs side by side, to the end of all of them.

        Args:
            runs: of each its command line, and options: ``fault`` (a name of :data:`tests.faults.faults.FAULTS`, and its
                argument), ``environment``.
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
    import wandb  # noqa: F401, PLC0415 (imported once, before any fork)

    import launch.training  # noqa: F401, PLC0415

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
            os.environ.update(job.get("environment", {}))
            code = _train(job)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


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
