"""Runs a benchmark in a process of its own, without the real data."""

from subprocess import CompletedProcess

from tests.processes import run_script


def run_benchmark(name: str, *arguments: str) -> CompletedProcess[str]:
    """``python benchmarks/NAME …`` with output captured."""
    return run_script(f"benchmarks/{name}", *arguments, environment={"TILTMETER_SHARED": None})


def result_of(output: str) -> dict[str, float]:
    """Key → value of the last line, ``RESULT key=value …``."""
    word, *parts = output.strip().splitlines()[-1].split()
    assert word == "RESULT"
    return {name: float(value) for name, value in (part.split("=") for part in parts)}
