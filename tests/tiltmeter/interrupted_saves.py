"""``python -m tests.tiltmeter.interrupted_saves FOLDER write_file``: a save into copies of a folder, each killed one call later."""

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiltmeter.checkpoint_files import commit

CONTENT = bytes(range(64))
CALLS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "shutil.rmtree")
"""Audit events of everything that changes a folder (os.replace is an os.rename)."""


def write_file(path: Path) -> None:
    """A checkpoint that is one file."""
    path.write_bytes(CONTENT)


def write_folder(path: Path) -> None:
    """A checkpoint of shards."""
    (path / "deep").mkdir(parents=True)
    (path / ".metadata").write_bytes(CONTENT)
    (path / "deep" / "__0_0.distcp").write_bytes(CONTENT)


def save(folder: Path, step: int, *, name: str = "last", write: Callable[[Path], None] = write_file) -> Path:
    """Commit a checkpoint; returns where its data is."""
    link = folder / f"{name}.ckpt"
    commit(link, write, step=step, made_by={"versions": {"torch": "2.13.0"}})
    return link.with_name(link.readlink().name)


def _save_and_die(folder: Path, write: Callable[[Path], None], *, before_call: int) -> None:
    calls = itertools.count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CALLS and str(folder) in str(arguments[0]) and next(calls) == before_call:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    save(folder, 9, write=write)


def main(start: Path, write: Callable[[Path], None]) -> None:
    """Copies ``killed-1``, ``killed-2`` … beside ``start``, until one is saved into without being killed."""
    for n in itertools.count(1):
        folder = start.with_name(f"killed-{n}")
        shutil.copytree(start, folder, symlinks=True)
        child = os.fork()
        if child == 0:
            _save_and_die(folder, write, before_call=n)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), {"write_file": write_file, "write_folder": write_folder}[sys.argv[2]])
