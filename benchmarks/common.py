"""What all benchmarks share: sides in processes of their own that take turns, tables, and the RESULT line.

Imports nothing heavy, so that a worker's memory is that of its own side alone.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tiltmeter.errors import UserError
from tiltmeter.plain_text import allow_any_encoding
from tiltmeter.threads import usable_cores

ROOT = Path(__file__).resolve().parents[1]
WRONG_INPUT = 2
Message = dict[str, Any]


class Spread(NamedTuple):
    """Smallest, middle and largest of repeated measurements."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of some values.

        >>> str(Spread.of([3.0, 1.0, 2.0]))
        '1.00 · 2.00 · 3.00'
        """
        return cls(min(values), statistics.median(values), max(values))

    def __str__(self) -> str:
        return " · ".join(three_digits(value) for value in self)


def three_digits(value: float) -> str:
    """A number with about three significant digits.

    >>> [three_digits(x) for x in (12345.6, 123.4, 12.34, 1.234, 0.1234)]
    ['12,346', '123', '12.3', '1.23', '0.123']
    """
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{decimals}f}"


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table that is legible as it is and as Markdown; the first column is aligned left, all others right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "| " + " | ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    print("\n".join(["", title, "", line(head), rule, *(line(row) for row in rows)]), flush=True)


def print_result(**values: float) -> None:
    """The last line of every benchmark, for programs to read."""
    print("\nRESULT " + " ".join(f"{name}={value:.4g}" for name, value in values.items()), flush=True)


def progress(text: str) -> None:
    """One line on standard error, so that standard output holds the results alone."""
    print(text, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def machine(threads: int) -> str:
    """The machine and the versions that matter, in words."""
    import torch
    import transformers

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    place = f"{threads} of {usable_cores()} cores, {name}, load average {os.getloadavg()[0]:.1f} before the start"
    if torch.cuda.is_available():
        place += f", {torch.cuda.get_device_name()}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{place}; {versions}"


def check_device(device: str) -> None:
    """Refuse a GPU that isn't there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to torch here; use --device cpu")


def synchronizer(device: str) -> Callable[[], None]:
    """What waits until everything that was started on a device is done."""
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def peak_memory_mb(device: str) -> float:
    """Largest memory of this process so far, in 10^6 bytes: resident on the CPU, allocated by torch on a GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    if (
        peak := _linux_memory_mb("VmHWM")
    ) is not None:  # ru_maxrss begins with the size of the process that started this one
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes there, kibibytes elsewhere


def resident_memory_mb() -> float:
    """Memory of this process now, in 10^6 bytes; elsewhere than on Linux its largest so far."""
    resident = _linux_memory_mb("VmRSS")
    return peak_memory_mb("cpu") if resident is None else resident


def forget_peak_memory() -> None:
    """Let :func:`peak_memory_mb` begin anew from what is resident now, where Linux allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _linux_memory_mb(field: str) -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    (line,) = [line for line in status.read_text().splitlines() if line.startswith(f"{field}:")] or [""]
    return int(line.split()[1]) * 1024 / 1e6 if line else None


@contextmanager
def clear_errors() -> Iterator[None]:
    """Wrong input ends the program with one line and exit code 2."""
    allow_any_encoding()
    try:
        yield
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        sys.exit(WRONG_INPUT)


class Worker:
    """One side of a comparison in a process of its own, seen from the program that hands out turns.

    The process (:mod:`benchmarks.worker`) says ``ready`` once its libraries are loaded, then for each line it is sent runs
    one turn and answers its seconds, and at last sends a summary. Everything that it prints goes to a log file.
    """

    def __init__(self, name: str, module: str, settings: Mapping[str, Any], *, log: Path, threads: int) -> None:
        self.name = name
        self._log = log
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        settled = {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", module, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | settled | counts,
            )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in filter(None, (self._process.stdin, self._process.stdout)):
            pipe.close()

    def receive(self) -> Message:
        """The next message of the process.

        Raises:
            UserError: it reports an error, or it is gone.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        message: Message = json.loads(line) if line else {"error": self._last_words()}
        if "error" in message:
            raise UserError(f"{self.name}: {message['error']}")
        return message

    def take_turn(self) -> float:
        """Let the process run one turn; returns its seconds."""
        self._go()
        return float(self.receive()["seconds"])

    def finish(self) -> Message:
        """Let the process end, once every process has taken its last turn; returns its summary."""
        self._go()
        return self.receive()

    def _go(self) -> None:
        assert self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"its process ended early (exit code {code}): {lines[-1][:300] if lines else 'it printed nothing'}"


class SideResult(NamedTuple):
    """What one side measured."""

    seconds: list[float]
    """Of each turn."""
    summary: Message


def take_turns(workers: Sequence[Worker], n_turns: Mapping[str, int]) -> dict[str, SideResult]:
    """Interleave the turns of all workers, each first in rotation; never do two compute at once.

    Turn 0 is for setting up and warming up.
    """
    with ExitStack() as stack:
        for worker in workers:
            stack.enter_context(worker)
        for worker in workers:
            worker.receive()
        seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
        for turn in range(max(n_turns.values())):
            first = max(0, turn - 1) % len(workers)
            for worker in [*workers[first:], *workers[:first]]:
                if turn < n_turns[worker.name]:
                    seconds[worker.name].append(worker.take_turn())
                    progress(f"  turn {turn}: {worker.name}, {seconds[worker.name][-1]:.1f} s")
        return {worker.name: SideResult(seconds[worker.name], worker.finish()) for worker in workers}
