"""F9 and F27: one process a run folder, and a folder that can be written to."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.processes.run_lock import LOCK, check_writable, run_lock
from tests.processes import ROOT
from tiltmeter.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from launch.processes.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""

KILLED = """
import os, signal, sys
from pathlib import Path
from launch.processes.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    begun, begins = os.pipe()
    if not os.fork():  # a worker, which outlives the run until its standard input closes
        os.write(begins, b"x")
        sys.stdin.read()
        os._exit(0)
    os.read(begun, 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_f27_a_second_process_is_told_who_holds_the_folder_and_takes_over_when_that_one_was_killed(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as refused, run_lock(tmp_path):
            pass
        who = f"process {holder.pid} on {socket.gethostname()}, since "
        assert str(refused.value).startswith(f"{tmp_path}: {who}")
        assert "is training in this run folder" in str(refused.value)
        holder.send_signal(signal.SIGKILL)
    with run_lock(tmp_path) as before:
        assert before is not None
        assert before.startswith(who)
        assert json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_free_again_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        _ = 1 / 0
    with run_lock(tmp_path) as before:
        assert before is None


def test_a_forked_data_worker_does_not_hold_the_lock_of_a_killed_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) as run:
        assert run.wait() == -signal.SIGKILL
        with run_lock(tmp_path) as before:
            assert before is not None
            assert before.startswith(f"process {run.pid} ")


def test_f9_a_folder_that_nobody_may_write_to_is_known_before_anything_starts(tmp_path: Path) -> None:
    check_writable(tmp_path / "runs" / "to" / "be", key="runs_root")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"^runs_root: cannot write to /sys \("):
        check_writable(Path("/sys/tiltmeter/runs"), key="runs_root")  # where not even root may
