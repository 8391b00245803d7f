"""Settings of OpenMP's threads, made by importing this module before torch, whose OpenMP reads the environment as it is loaded.

Threads that wait sleep instead of spinning: beside one other busy process a spinning thread holds the core that the thread it
waits for needs. There are as many of them as the cores that this process may use: torch counts those of the affinity mask,
Lightning divides them among the processes of a machine, torchrun gives each of several one; what they don't see is told here: a
container's share of CPU time, and SLURM's cores of each task. What the user has set stays.
"""

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(cpu_max: Path = _CPU_MAX) -> int:
    """Cores that this process may use: those of its affinity mask, or fewer where its control group has less CPU time.

    Args:
        cpu_max: the group's file (Linux, control groups v2), ``QUOTA PERIOD`` in microseconds or ``max PERIOD``.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, cpu_max.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return cores
    return max(1, min(cores, math.ceil(quota / period)))


def settle_threads(environment: MutableMapping[str, str], *, cpu_max: Path = _CPU_MAX) -> None:
    """Add to an environment how OpenMP's threads wait and, where torch could not tell, how many there are.

    ``GOMP_SPINCOUNT`` is read by GNU's OpenMP, ``KMP_BLOCKTIME`` by Intel's and LLVM's, in milliseconds.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment["OMP_WAIT_POLICY"] = "passive"
        environment.setdefault("GOMP_SPINCOUNT", "0")
        environment.setdefault("KMP_BLOCKTIME", "0")
    if "OMP_NUM_THREADS" not in environment:
        cores = usable_cores(cpu_max)
        if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_CPUS_PER_TASK" in environment:
            environment["OMP_NUM_THREADS"] = str(min(int(environment["SLURM_CPUS_PER_TASK"]), cores))
        elif cores < usable_cores(Path(os.devnull)):
            environment["OMP_NUM_THREADS"] = str(cores)


settle_threads(os.environ)
