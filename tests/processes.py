"""Python programs in processes of their own, forked from one that has imported the libraries already.

Importing Lightning and what a run needs takes longer than most runs of the suite do; a forked process has it for nothing. All
else is as if ``python SCRIPT ARGUMENTS`` had been called: arguments, environment, folder, output, exit code and process id.
"""

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = (
    "launch.training",
    "launch.analyzing",
    "transformers.models.llama.modeling_llama",
    "wandb",
    "torch._dynamo",
)

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(list(PRELOADED))
_PER_PROCESS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
"""What a launcher says to one process, which another run in this one may have left behind."""


class Running:
    """A started script.

    Args:
        script: below the root of the project.
        arguments: of its command line.
        folder: it works in; None: the root.
        environment: beside the one of this process, without those of value None; one thread and a terminal of 160 columns
            are set already.
    """

    def __init__(
        self,
        script: str,
        *arguments: str,
        folder: Path | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        self.arguments = (str(ROOT / script), *arguments)
        self._said = Path(tempfile.mkdtemp())
        self.stdout, self.stderr = self._said / "stdout", self._said / "stderr"
        kept = {name: value for name, value in os.environ.items() if name not in _PER_PROCESS}
        asked = kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"} | dict(environment or {})
        known = {name: value for name, value in asked.items() if value is not None}
        work = (self.arguments, str(folder or ROOT), known, str(self.stdout), str(self.stderr))
        self._process = _forks.Process(target=_run_script, args=work, daemon=False)
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
        self._process.join(timeout)
        in_time = not self._process.is_alive()
        self._process.kill()
        self._process.join()
        said = [path.read_text(encoding="utf-8", errors="replace") for path in (self.stdout, self.stderr)]
        shutil.rmtree(self._said)
        if not in_time:
            raise TimeoutExpired(self.arguments, timeout, *said)
        code = self._process.exitcode
        assert code is not None
        return CompletedProcess(self.arguments, code, *said)


def run_script(
    script: str,
    *arguments: str,
    folder: Path | None = None,
    environment: Mapping[str, str | None] | None = None,
    timeout: float = 240,
) -> CompletedProcess[str]:
    """``python SCRIPT …`` to its end, with output captured; see :class:`Running`."""
    return Running(script, *arguments, folder=folder, environment=environment).wait(timeout)


def _run_script(arguments: tuple[str, ...], folder: str, known: dict[str, str], stdout: str, stderr: str) -> None:
    """In the forked process: become ``python SCRIPT …``."""
    for number, path in ((0, os.devnull), (1, stdout), (2, stderr)):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(known)
    os.chdir(folder)
    sys.argv = list(arguments)
    sys.path.insert(0, str(Path(arguments[0]).parent))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    atexit._clear()  # folders that libraries made on import are not this process's to remove
    for inherited in list(weakref.finalize._registry):
        inherited.atexit = False
    weakref.finalize._registered_with_atexit = False
    rank_zero_only.rank = _get_rank() or 0  # as it would be when Lightning is imported
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
