"""Runs a benchmark in a process of its own, without the real data."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_benchmark(name: str, *arguments: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """``python benchmarks/NAME …`` with output captured."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("TILTMETER_SHARED", None)
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def result_of(output: str) -> dict[str, float]:
    """Key → value of the last line, ``RESULT key=value …``."""
    word, *parts = output.strip().splitlines()[-1].split()
    assert word == "RESULT"
    return {name: float(value) for name, value in (part.split("=") for part in parts)}
