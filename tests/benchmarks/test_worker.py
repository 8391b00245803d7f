"""A worker is a process of its own that waits for its turns, and says in one line what failed; this file is its work, too."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import Worker, take_turns
from benchmarks.worker import Channel, Turns
from tiltmeter.errors import UserError


def work(settings: dict[str, Any], channel: Channel) -> dict[str, Any]:
    turns = Turns([0, 1], channel, lambda: None)
    turns.before_step()
    sys.stdout.write("a library's own words\n")
    if settings["fails"]:
        raise UserError("no such\nfile")
    turns.end()
    return {"process": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}


def started(folder: Path, *, fails: bool = False) -> Worker:
    return Worker("side", "tests.benchmarks.test_worker", {"fails": fails}, log=folder / "log", threads=3)


def test_a_worker_is_another_process_with_its_own_threads_and_its_words_in_a_log(tmp_path: Path) -> None:
    found = take_turns([started(tmp_path)], {"side": 2})["side"]
    assert len(found.seconds) == 2
    assert found.summary["process"] != os.getpid()
    assert found.summary["threads"] == "3"
    assert (tmp_path / "log").read_text(encoding="utf-8") == "a library's own words\n"


def test_what_fails_in_a_worker_is_one_line_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^side: no such file$"):
        take_turns([started(tmp_path, fails=True)], {"side": 2})
