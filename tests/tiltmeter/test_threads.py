"""How threads wait is settled before torch is imported, by every command, and what the user set stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import HANGS, ROOT
from tiltmeter.threads import settle_threads, usable_cores

WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
COMMANDS = ["train.py", "analyze.py", "analysis/report/dashboard.py"] + [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8") and path.name != "worker.py"  # which inherits its environment
]
UNTIL_TORCH = """
import json, os, runpy, sys
class Torch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "sklearn"):
            print(json.dumps(dict(os.environ)), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Torch())
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv[1], run_name="imported")
print(json.dumps(dict(os.environ)))
"""


def environment(**own: str) -> dict[str, str]:
    ours = (*WAITING, "OMP_NUM_THREADS", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK")
    return {name: value for name, value in os.environ.items() if name not in ours} | own


def run(*arguments: str, **own: str) -> subprocess.CompletedProcess[str]:
    command, known = [sys.executable, "-c", *arguments], environment(**own)
    return subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True, check=True, timeout=HANGS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_settles_how_threads_wait_before_torch_is_imported(command: str) -> None:
    seen = json.loads(run(UNTIL_TORCH, command).stdout)
    assert {name: seen.get(name) for name in WAITING} == WAITING


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes can't be bound to cores here")
def test_torch_takes_what_was_settled_and_the_cores_of_its_affinity_mask() -> None:
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import tiltmeter.threads as t, torch; "
    )
    done = run(script + "print(t.usable_cores(), torch.get_num_threads())", OMP_DISPLAY_ENV="VERBOSE")
    assert done.stdout.split() == ["1", "1"]
    assert "GOMP_SPINCOUNT = '0'" in done.stderr, "which libgomp read as it was loaded"
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


@pytest.mark.parametrize(
    "own",
    [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1000"}, {"KMP_BLOCKTIME": "200"}, {"OMP_NUM_THREADS": "7"}],
)
def test_a_setting_of_the_users_own_stays(own: dict[str, str]) -> None:
    known = dict(own)
    settle_threads(known)
    assert known | own == known
    if "OMP_WAIT_POLICY" in own:
        assert "GOMP_SPINCOUNT" not in known, "it would overrule the policy"


@pytest.mark.parametrize(
    ("text", "cores"), [("50000 100000", 1), ("100000 100000", 1), ("max 100000", None), ("99900000 100000", None)]
)
def test_a_containers_share_of_cpu_time_counts_as_cores(text: str, cores: int | None, tmp_path: Path) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(text + "\n")
    all_cores = usable_cores(tmp_path / "no such file")
    assert usable_cores(file) == (cores or all_cores)
    known: dict[str, str] = {}
    settle_threads(known, cpu_max=file)
    assert known.get("OMP_NUM_THREADS") == (str(cores) if cores and cores < all_cores else None)


def test_a_task_of_slurm_takes_its_own_cores_undivided() -> None:
    known = {"SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "1"}
    settle_threads(known)
    assert known["OMP_NUM_THREADS"] == "1"
    alone = {
        "SLURM_NTASKS": "1",
        "SLURM_CPUS_PER_TASK": "1",
    }  # Lightning may start several processes in it, and divides
    settle_threads(alone)
    assert "OMP_NUM_THREADS" not in alone
