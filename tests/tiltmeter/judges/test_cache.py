import os
import sqlite3
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.processes import HANGS, Forked, codes, wait_for_all
from tests.tiltmeter.scoring.asking import judge, question
from tests.tiltmeter.scoring.stub_endpoint import StubEndpoint
from tiltmeter.errors import UserError
from tiltmeter.judges.cache import ReplyCache, cache_key

SAID: list[dict[str, Any]] = [{"choices": [{"message": {"content": "ü 4"}}], "usage": {"prompt_tokens": 3}}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.sqlite"


def test_what_is_put_is_got_and_nothing_else(path: Path) -> None:
    cache = ReplyCache(path)
    cache.check()
    cache.put("a", {"model": "m"}, SAID)
    assert ReplyCache(path).get(["a", "b"]) == {"a": SAID}
    cache.put("a", {"model": "m"}, [])
    assert cache.get(["a"]) == {"a": []}
    assert cache.take_notices() == []


def test_more_keys_than_sqlite_takes_at_once(path: Path) -> None:
    cache = ReplyCache(path)
    cache.put("7", {}, SAID)
    assert cache.get(str(i) for i in range(40_000)) == {"7": SAID}


def test_the_file_says_what_was_asked_and_is_in_wal_mode(path: Path) -> None:
    ReplyCache(path).put("a", {"model": "m", "body": {"n": 2}}, SAID)
    database = sqlite3.connect(path)
    assert database.execute("SELECT asked FROM replies").fetchall() == [('{"model": "m", "body": {"n": 2}}',)]
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()


def test_the_key_is_pinned() -> None:
    """Another spelling would make every cache worthless without a word."""
    asked = {"model": "m", "body": {"messages": [{"role": "user", "content": "ü"}], "n": 1}}
    assert cache_key(asked) == "a2fbf26507503d62beebe84eb2bb96d3ac33effa9e0c107820ed6599cf56dbc7"


def test_a_file_that_is_no_database_is_kept_aside_with_one_warning(path: Path) -> None:
    path.write_bytes(b"not a database, but worth keeping" * 100)
    cache = ReplyCache(path)
    cache.put("a", {}, SAID)
    assert cache.get(["a"]) == {"a": SAID}
    (notice,) = cache.take_notices()
    assert notice.startswith(f"cache: {path}: damaged (file is not a database)")
    (kept,) = path.parent.glob("cache.sqlite.damaged-*")
    assert kept.read_bytes().startswith(b"not a database")


def test_a_database_cut_short_or_overwritten_is_a_miss_and_a_new_beginning(path: Path) -> None:
    cache = ReplyCache(path)
    for i in range(40):
        cache.put(str(i), {"text": "x" * 3000}, SAID)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4096] + os.urandom(len(whole) - 4096)):
        for old in path.parent.iterdir():
            old.unlink()
        path.write_bytes(damaged)
        found = cache.get(str(i) for i in range(40))
        assert all(said == SAID for said in found.values())
        cache.put("new", {}, SAID)
        cache.put("new", {}, SAID)
        assert cache.get(["new"]) == {"new": SAID}
        (notice,) = cache.take_notices()
        assert "damaged" in notice


def test_the_log_of_a_damaged_file_goes_with_it(path: Path) -> None:
    """Another process has the file open, so its log stays; read into the next file, it would damage that one too."""
    cache = ReplyCache(path)
    cache.check()
    with closing(sqlite3.connect(path)) as other:
        other.execute("SELECT * FROM replies").fetchall()
        cache.put("a", {"text": "x" * 9000}, SAID)
        with path.open("r+b") as file:
            file.write(b"not a database" * 1000)
        path.with_name("cache.sqlite-wal").write_bytes(b"no log" * 1000)
        assert cache.get(["a"]) == {}
        cache.put("b", {}, SAID)
        assert cache.get(["a", "b"]) == {"b": SAID}
        assert list(path.parent.glob("*.damaged-*-wal"))


def test_a_damaged_row_is_a_miss(path: Path) -> None:
    with StubEndpoint() as stub:
        asked = judge(stub, cache=str(path))
        asked.ask([question()])
        for text in ("[{", "[]", "[3]", "{}", '[{"choices": [{}]}]', '[{"choices": []}]', "null"):
            database = sqlite3.connect(path, isolation_level=None)
            assert database.execute("UPDATE replies SET responses = ?", (text,)).rowcount == 1
            database.close()
            assert asked.ask([question()])[0].texts == ("4",)
        assert len(stub.requests) == 8
        assert asked.ask([question()])[0].texts == ("4",)
        assert len(stub.requests) == 8


def test_a_damaged_file_does_not_stop_the_judge(path: Path) -> None:
    path.write_bytes(b"x" * 9999)
    with StubEndpoint() as stub:
        with pytest.warns(UserWarning, match="damaged") as caught:
            assert judge(stub, cache=str(path)).ask([question()])[0].texts == ("4",)
        assert len(caught) == 1
        assert judge(stub, cache=str(path)).ask([question()])[0].texts == ("4",)
        assert len(stub.requests) == 1


def test_a_file_that_can_not_be_written_is_an_error_at_the_start_and_a_warning_later(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "cache.sqlite", tmp_path):
        with StubEndpoint() as stub:
            asked = judge(stub, cache=str(path))
            with pytest.raises(UserError, match=r"^cache: .*can't be written"):
                asked.start(want_probabilities=False)
            with pytest.warns(UserWarning, match=r"^cache: "):
                assert asked.ask([question()])[0].texts == ("4",)


def test_a_locked_file_is_a_miss_and_stays_where_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiltmeter.judges.cache._SECONDS_FOR_A_LOCK", 0.01)
    cache = ReplyCache(path)
    cache.put("a", {}, SAID)
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("BEGIN IMMEDIATE")
    cache.put("b", {}, SAID)
    database.execute("ROLLBACK")
    database.close()
    assert cache.get(["a", "b"]) == {"a": SAID}
    (notice,) = cache.take_notices()
    assert "locked" in notice


def test_a_file_that_takes_nothing_is_waited_for_once_a_round(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiltmeter.judges.cache._SECONDS_FOR_A_LOCK", 0.01)
    tries = []
    put = ReplyCache.put
    monkeypatch.setattr(ReplyCache, "put", lambda self, *row: tries.append(row) or put(self, *row))
    ReplyCache(path).check()
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("BEGIN IMMEDIATE")
    with StubEndpoint() as stub, pytest.warns(UserWarning, match="locked"):
        replies = judge(stub, cache=str(path)).ask([question(str(i)) for i in range(5)])
    database.close()
    assert [reply.texts for reply in replies] == [("4",)] * 5
    assert len(tries) == 1


def fill(path: Path, name: str) -> list[str]:
    cache = ReplyCache(path)
    for i in range(15):
        cache.put(f"{name} {i}", {}, SAID)
        cache.get([f"{name} {i}"])
    return cache.take_notices()


def test_threads_share_a_file_from_its_beginning(path: Path) -> None:
    notices: list[str] = []
    threads = [threading.Thread(target=lambda i=i: notices.extend(fill(path, str(i)))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert notices == []
    assert len(ReplyCache(path).get(f"{i} {j}" for i in range(6) for j in range(15))) == 90


def fill_in_peace(path: Path, name: str) -> None:
    assert fill(path, name) == []


@pytest.mark.slow
def test_processes_share_a_file_from_its_beginning(path: Path) -> None:
    ended = wait_for_all([Forked(partial(fill_in_peace, path, str(i))) for i in range(4)], HANGS)
    assert codes(ended) == [0] * 4, ended
    assert len(ReplyCache(path).get(f"{i} {j}" for i in range(4) for j in range(15))) == 60
