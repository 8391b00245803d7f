"""Runs a benchmark in a process of its own, without the real data; its workers are forked from it."""

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from subprocess import PIPE, CompletedProcess
from types import SimpleNamespace
from typing import IO, Any

from tests.processes import run_script


def run_benchmark(name: str, *arguments: str, before: Callable[[], None] | None = None) -> CompletedProcess[str]:
    """``python benchmarks/NAME …`` with output captured; ``before`` is called in its process first."""
    first = partial(_in_turn, fork_workers, before) if before else fork_workers
    return run_script(f"benchmarks/{name}", *arguments, before=first, environment={"TILTMETER_SHARED": None})


def result_of(output: str) -> dict[str, float]:
    """Key → value of the last line, ``RESULT key=value …``."""
    word, *parts = output.strip().splitlines()[-1].split()
    assert word == "RESULT"
    return {name: float(value) for name, value in (part.split("=") for part in parts)}


def _in_turn(*calls: Callable[[], None]) -> None:
    for call in calls:
        call()


def few_texts(few: int) -> None:
    """So many pairs stand in for HH, whatever is asked for: nothing is timed, and a tokenizer is trained on them."""
    from benchmarks import workload

    made = workload.HHLengths.__init__
    workload.HHLengths.__init__ = lambda self, n_pairs: made(self, few)  # type: ignore[method-assign]


def in_miniature() -> None:
    """Smaller models, shorter and fewer texts, smaller matrices: in tests nothing is timed."""
    from benchmarks import matmul_rate, watched_run, workload

    tiny = workload.SHAPES["tiny"]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    workload.SHAPES["tiny"] = replace(tiny, architecture=tiny.architecture | sizes)
    workload.MAX_LENGTH = 128
    workload.HEAD_TOKENS, workload.HEAD_WIDTH = 2048, 64
    few_texts(120)
    matmul_rate.MATMULS["cpu"] = ((256, 64, 64), (64, 256, 64))
    rate = matmul_rate.matmul_rate
    matmul_rate.matmul_rate = lambda *asked, **library: rate(*asked[:-1], 0.01, **library)
    composed = watched_run.composed

    def smaller(settings: Any) -> Any:
        config = composed(settings)
        config.merge_with({"model": {"architecture": sizes}, "datamodule": {"max_length": workload.MAX_LENGTH}})
        return config

    watched_run.composed = smaller


def fork_workers() -> None:
    """Start workers as copies of the benchmark's process: five that import the libraries anew take a minute of CPU time."""
    from benchmarks import common

    common.subprocess = SimpleNamespace(Popen=ForkedWorker, PIPE=PIPE)  # type: ignore[assignment]


class ForkedWorker:
    """What :class:`benchmarks.common.Worker` needs of ``subprocess.Popen``."""

    def __init__(self, command: Sequence[str], *, stderr: IO[str], env: Mapping[str, str], **_: Any) -> None:
        (receives, asks), (answers, says) = os.pipe(), os.pipe()
        module, settings = command[-2:]
        importlib.import_module(module)  # once for all workers of a kind
        arguments = (module, settings, receives, says, stderr.fileno(), dict(env))
        self._process = multiprocessing.get_context("fork").Process(target=_serve, args=arguments)
        self._process.start()
        os.close(receives)
        os.close(says)
        self.stdin, self.stdout = os.fdopen(asks, "w"), os.fdopen(answers)

    def poll(self) -> int | None:
        """Exit code, once it has ended."""
        return self._process.exitcode

    def kill(self) -> None:
        """End it."""
        self._process.kill()

    def wait(self) -> int | None:
        """Exit code, when it has ended."""
        self._process.join()
        return self._process.exitcode


def _serve(module: str, settings: str, receives: int, says: int, errors: int, environment: Mapping[str, str]) -> None:
    from benchmarks.worker import serve

    for number, file in enumerate((receives, says, errors)):
        os.dup2(file, number)
    sys.stdin = os.fdopen(0)
    os.environ.update(environment)
    serve(module, settings)
