"""Answers that were paid for once: a sqlite file that several threads and processes may use at a time (on a local disk).

A damaged row is a miss: the question is asked again. A damaged file is set aside, and a new one begun.
"""

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from tiltmeter.errors import UserError

T = TypeVar("T")
_KEYS_AT_A_TIME = 500
_SECONDS_FOR_A_LOCK = 5.0
_TABLE = """CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, asked TEXT NOT NULL, responses TEXT NOT NULL, stored TEXT NOT NULL
) WITHOUT ROWID"""


def cache_key(asked: Mapping[str, Any]) -> str:
    """sha256 of everything that decides an answer, as canonical JSON.

    >>> cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1}) != cache_key({"a": 1, "b": 3})
    True
    """
    return sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class ReplyCache:
    """Raw responses by the key of what was asked.

    Every call opens the file anew, so an instance belongs to no thread or process. After :meth:`check` what goes wrong is
    no exception, since a cache must not stop what works without it, but a notice for whoever warns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._notices: list[str] = []

    def take_notices(self) -> list[str]:
        """Problems since the last call, each once."""
        taken, self._notices = self._notices, []
        return taken

    def check(self) -> None:
        """Make the file if it is missing.

        Raises:
            UserError: it can't be opened or written.
        """
        try:
            self._with_database(lambda database: database.executescript("BEGIN IMMEDIATE; ROLLBACK"))
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"judge.cache: {self.path} can't be written ({error}); name another file, or null"
            ) from None

    def get(self, keys: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """The responses of those keys that are there."""
        wanted = list(keys)

        def read(database: sqlite3.Connection) -> list[tuple[str, str]]:
            rows = []
            for start in range(0, len(wanted), _KEYS_AT_A_TIME):
                some = wanted[start : start + _KEYS_AT_A_TIME]
                query = f"SELECT key, responses FROM replies WHERE key IN ({','.join('?' * len(some))})"
                rows += database.execute(query, some).fetchall()
            return rows

        try:
            rows = self._with_database(read)
        except (OSError, sqlite3.Error) as error:
            self._note(error)
            return {}
        return {key: responses for key, text in rows if (responses := _responses(text)) is not None}

    def put(self, key: str, asked: Mapping[str, Any], responses: Sequence[Mapping[str, Any]]) -> bool:
        """Store the responses to what was asked, replacing older ones; False: the file took nothing."""
        row = (key, json.dumps(asked), json.dumps(responses), datetime.now(UTC).isoformat(timespec="seconds"))
        try:
            self._with_database(
                lambda database: database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", row)
            )
        except (OSError, sqlite3.Error) as error:
            self._note(error)
            return False
        return True

    def _with_database(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do ``work`` with the open file; a damaged one is set aside and a new one begun."""
        seen = _inode(self.path)
        try:
            with closing(self._open()) as database:
                return work(database)
        except sqlite3.DatabaseError as error:
            if not self._set_aside(error, seen):
                raise
        with closing(self._open()) as database:
            return work(database)

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.path, timeout=_SECONDS_FOR_A_LOCK, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            database.execute(_TABLE)
        except sqlite3.Error:
            database.close()
            raise
        return database

    def _set_aside(self, error: sqlite3.DatabaseError, seen: int | None) -> bool:
        """Rename a file that sqlite calls damaged; False: the error was about something else."""
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return False
        if _inode(self.path) == seen:  # else another process was faster
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
            for suffix in ("-wal", "-shm", ""):  # a log must not outlive its file: it would be read into the next one
                old = self.path.with_name(self.path.name + suffix)
                if old.exists():
                    old.rename(self.path.with_name(f"{self.path.name}.damaged-{stamp}{suffix}"))
            self._note(f"damaged ({error}); kept as {self.path.name}.damaged-{stamp}, a new one is begun")
        return True

    def _note(self, what: object) -> None:
        notice = f"judge.cache: {self.path}: {what}"
        if notice not in self._notices:
            self._notices.append(notice)


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _responses(text: str) -> list[dict[str, Any]] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, list) and all(isinstance(one, dict) for one in found) else None
