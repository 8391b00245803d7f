"""One process a run folder, and a folder that can be written to: both known before anything expensive starts."""

import fcntl
import json
import os
import socket
import tempfile
import warnings
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO

from tiltmeter.errors import UserError

LOCK = "run.lock"


class RunLock:
    """Held while a run writes its folder (``with``), gone afterwards; the system frees it when the process dies, however.

    ``run.lock`` says who holds it. A file without a lock on it is what a killed process left: it is taken over, and
    :attr:`taken_over` says whose it was.

    Args:
        run_dir: the run folder, which exists.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LOCK
        self.taken_over: str | None = None
        self._file = self._open()

    def __enter__(self) -> "RunLock":
        """Held since it was made."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the file and free the lock."""
        self.path.unlink(missing_ok=True)
        self._file.close()

    def _open(self) -> IO[str]:
        while True:
            file = self.path.open("a+", encoding="utf-8")
            file.seek(0)
            holder = _holder(file.read())
            try:
                # a record lock, which children don't inherit: a data worker that outlives a killed run doesn't hold it
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.close()
                raise UserError(
                    f"{self.path.parent}: {holder or 'another process'} is training in this run folder; wait for it or stop it"
                ) from None
            except OSError as error:
                warnings.warn(f"{self.path}: this file system has no locks ({error.strerror})", stacklevel=3)
            if self._is_still_there(file):
                break
            file.close()  # its holder finished and removed it in between
        self.taken_over = holder
        file.truncate(0)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        with suppress(OSError):  # a full disk: held all the same, only nobody is told by whom
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since}, file)
            file.flush()
        return file

    def _is_still_there(self, file: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False


def _holder(text: str) -> str | None:
    try:
        found = json.loads(text)
        return f"process {found['pid']} on {found['host']}, since {found['since']},"
    except (ValueError, KeyError, TypeError):
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
