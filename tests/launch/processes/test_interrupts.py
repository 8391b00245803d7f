"""Ctrl-C at any moment of a command: one line, exit code 130, nothing left behind."""

import importlib.abc
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.cli import TINY
from tests.processes import run_script


def press(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def press_at(place: str) -> None:
    """In the process of the command, before it begins."""
    module, _, name = place.rpartition(".")
    setattr(sys.modules[module], name, press)


class PressWhenImported(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, *_: Any) -> None:
        if name == "launch.command":
            press()


def press_during_imports() -> None:
    del sys.modules["launch.command"]
    del sys.modules["launch.processes.interrupts"]
    sys.meta_path.insert(0, PressWhenImported())


@pytest.mark.parametrize(
    ("script", "arguments", "place"),
    [
        ("analyze.py", ("run=last",), "launch.analyzing.find_run"),
        ("train.py", TINY, "launch.training.build_parts"),
    ],
)
def test_ctrl_c_is_one_line(script: str, arguments: tuple[str, ...], place: str, tmp_path: Path) -> None:
    done = run_script(script, *arguments, f"runs_root={tmp_path / 'runs'}", before=partial(press_at, place))
    assert (done.returncode, done.stderr) == (130, "tiltmeter: stopped by Ctrl-C\n")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("script", ["analyze.py", "train.py"])
def test_ctrl_c_while_libraries_are_imported_says_nothing(script: str) -> None:
    done = run_script(script, before=press_during_imports)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
