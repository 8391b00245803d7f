"""One process a run folder, and a folder that can be written to: both known before anything expensive starts."""

import json
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from tiltmeter.errors import UserError

LOCK = "run.lock"


@contextmanager
def run_lock(run_dir: Path) -> Iterator[str | None]:
    """Hold a run folder while a run writes it; the system frees it when the process dies, however.

    ``run.lock`` says who holds it and is gone afterwards. A file without a lock on it is what a killed process left.

    Yields:
        whose lock was taken over; None: there was none.

    Raises:
        UserError: another process holds it.
    """
    path = run_dir / LOCK
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    holder = _holder(path)
    try:
        lock.acquire()
    except Timeout:
        who = _holder(path) or "another process"
        raise UserError(f"{run_dir}: {who} is training in this run folder; wait for it or stop it") from None
    except OSError as error:
        warnings.warn(f"{path}: this file system has no locks ({error.strerror})", stacklevel=3)
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    with suppress(OSError):  # a full disk: held all the same, only nobody is told by whom
        path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}), "utf-8")
    try:
        yield holder
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str | None:
    try:
        found = json.loads(path.read_text("utf-8"))
        return f"process {found['pid']} on {found['host']}, since {found['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_writable(folder: Path, *, key: str) -> None:
    """Write a few bytes where a folder is or will be, and leave nothing.

    Args:
        folder: it may not exist yet; then the nearest one above it is tried.
        key: what the user sets to have another one.

    Raises:
        UserError: it can't be written to.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"tiltmeter")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{key}: cannot write to {there} ({error.strerror}); choose another folder or make room"
        ) from error
