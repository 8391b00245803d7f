"""Files that are whole or not there: written under a temporary name beside the target, then renamed."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tiltmeter.errors import FailedWrite, UserError

_NOT_THE_DISK = (UserError, TypeError, ValueError, LookupError, AttributeError, NameError, AssertionError, ImportError)
"""Mistakes of a program or its user; all else that a writer raises is taken for a write that failed."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a write that fails into one kind of error, whatever the library's own is.

    A full disk is an OSError to Python, a RuntimeError to ``torch.save``, a SafetensorError to safetensors and a bare
    Exception to tokenizers.

    Args:
        path: what is written, to be named.

    Raises:
        FailedWrite: the reason, and how much room there is.
    """
    try:
        yield
    except FailedWrite as error:
        raise FailedWrite(path, error.reason) from error
    except _NOT_THE_DISK:
        raise
    except Exception as error:
        raise FailedWrite(path, _reason(error, path)) from error


def _reason(error: Exception, path: Path) -> str:
    said = getattr(error, "strerror", None) or " ".join(str(error).split())[:160] or type(error).__name__
    with suppress(OSError, StopIteration):
        there = next(folder for folder in path.absolute().parents if folder.exists())
        return f"{said}; {shutil.disk_usage(there).free / 2**20:.1f} MiB are free there"
    return said


def write_atomically(target: Path, write: Callable[[Path], object], *, keep_existing: bool = False) -> None:
    """Let ``write`` fill a temporary file or folder beside the target, then rename it.

    The temporary name keeps the target's suffix, since writers look at it, and is no other process's.

    Args:
        target: a folder that is there already is replaced.
        write: fills the path that it is given.
        keep_existing: a folder that somebody else made meanwhile stays instead: it was named after what it holds.

    Raises:
        FailedWrite: a full disk, no permission …; the target is as it was.
    """
    unique = f".partial-{uuid.uuid4().hex[:12]}"
    temporary, replaced = (
        target.with_name(f"{unique}-{target.name}"),
        target.with_name(f"{unique}-replaced-{target.name}"),
    )
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            if target.is_dir() and not keep_existing:
                target.rename(replaced)  # never gone before the new one is whole
            try:
                temporary.replace(target)
            except OSError:
                if not (keep_existing and target.is_dir()):
                    raise
    finally:
        for path in (temporary, replaced):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


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
