"""Files that are whole or not there: written under a temporary name beside the target, then renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file or folder beside the target, then rename it.

    The temporary name keeps the target's suffix, since writers look at it. A folder that is there already is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".partial-{os.getpid()}-{target.name}")
    try:
        write(temporary)
        if target.is_dir():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_file(source: Path, target: Path) -> None:
    """A copy that is written to by nobody else: on file systems that can (XFS, Btrfs) it shares blocks, and never an inode."""
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            while os.copy_file_range(reader.fileno(), writer.fileno(), 2**30):
                pass
        is_whole = target.stat().st_size == source.stat().st_size
    except (OSError, AttributeError):  # not between these file systems, or not on this system
        is_whole = False
    if not is_whole:
        shutil.copyfile(source, target)


def write_text(path: Path, text: str) -> None:
    """A text file, UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """A small JSON file with sorted keys."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
