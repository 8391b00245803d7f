"""Strict reading: every damaged file ends in one line that names the place."""

import gzip
import os
import subprocess
import sys
import threading
from pathlib import Path
from socketserver import TCPServer
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from datamodules.files import jsonl
from datamodules.files.jsonl import hub_file, hub_location, list_files, read_rows
from tests.processes import ROOT
from tiltmeter.errors import UserError


class NoNetworkError(Exception):
    """The client's HTTP library has errors of its own, which are no OSErrors."""


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def message_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_plain_and_gzipped_rows_come_with_their_line_numbers(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b'{"a": 1}\n{"a": "\xc3\xa4"}\n')
    assert list(read_rows(path)) == [(1, {"a": 1}), (2, {"a": "ä"})]


def test_byte_order_mark_windows_line_ends_and_empty_lines_are_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n{"a": 3}')
    assert list(read_rows(path)) == [(1, {"a": 1}), (3, {"a": 2}), (4, {"a": 3})]


def test_unusual_line_separators_inside_a_string_do_not_end_the_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": "x\u2028y\u0085z"}\n'.encode())
    assert list(read_rows(path)) == [(1, {"a": "x\u2028y\u0085z"})]


def test_a_ten_megabyte_line_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": "' + b"x" * 10_000_000 + b'"}\n')
    assert [len(row["a"]) for _, row in read_rows(path)] == [10_000_000]


@pytest.mark.parametrize(
    ("second_line", "expected"),
    [
        (b'{"a": 1,, }', "{path}:2:9: bad JSON: "),
        (b'{"a": "x', "{path}:2:7: bad JSON: "),
        (b"[1, 2]", "{path}:2: expected a JSON object, got an array"),
        (b"null", "{path}:2: expected a JSON object, got null"),
        (b'{"a": "\xff"}', "{path}:2:8: invalid UTF-8, byte 0xff"),
        (b'{"a": "\\ud83d"}', "{path}:2: half a surrogate pair"),
        (b"[" * 100_000, "{path}:2: bad JSON: "),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_column(tmp_path: Path, second_line: bytes, expected: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": 0}\n' + second_line + b"\n")
    assert message_of(path).startswith(expected.format(path=path))


def test_a_whole_surrogate_pair_is_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": "\\ud83d\\ude00"}')
    assert next(read_rows(path))[1] == {"a": "😀"}


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_an_error(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path / "a.jsonl", data)
    assert message_of(path).startswith(f"{path}: empty file")


def test_damaged_gzip_data_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"a": "%s"}\n' % os.urandom(3000).hex().encode() * 3)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    assert message_of(path).startswith(f"{path}: damaged gzip data after line ")
    path.write_bytes(whole[:-6] + b"\0\0\0\0\0\0")
    assert "damaged gzip data" in message_of(path)


def test_gzip_data_and_suffix_must_agree(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"
    plain.write_bytes(b'{"a": 1}\n')
    packed.write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert "is not gzip data (if it is plain text, name it a.jsonl)" in message_of(plain)
    assert "is gzip data; name it b.jsonl.gz" in message_of(packed)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_git_lfs_pointer_is_recognised(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS pointer" in message_of(path)


def test_reading_a_missing_file_or_a_folder_is_one_line(tmp_path: Path) -> None:
    assert "no such file" in message_of(tmp_path / "gone.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert "can't be read" in message_of(tmp_path / "folder.jsonl")


def test_a_folder_lists_its_jsonl_files_sorted_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "README.md", "c.json", "._b.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "deeper.jsonl").mkdir()
    assert [f.name for f in list_files(tmp_path)] == ["a.jsonl.gz", "b.jsonl"]
    assert list_files(tmp_path / "b.jsonl") == [tmp_path / "b.jsonl"]


def test_path_without_jsonl_files_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^data\.path: no such file: hh/x\.jsonl \(expected \.jsonl, \.jsonl\.gz or a f"
    ):
        list_files("hh/x.jsonl")
    with pytest.raises(UserError, match=r"^data\.path: no \.jsonl or \.jsonl\.gz file in folder"):
        list_files(tmp_path)
    (tmp_path / "a.csv").touch()
    with pytest.raises(UserError, match=r"^data\.extra: not a JSONL file by its name"):
        list_files(tmp_path / "a.csv", key="data.extra")


def test_the_same_name_plain_and_gzipped_is_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"a\.jsonl and a\.jsonl\.gz, the same data twice"):
        list_files(tmp_path)


# --- the hub, without a network ---------------------------------------------------------------------------------------


def hub_message(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> str:
    def fail(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError) as caught:
        hub_file("Anthropic/hh-rlhf", "harmless-base/test.jsonl.gz", None, "data.path")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("data.path: can't get harmless-base/test.jsonl.gz of Anthropic/hh-rlhf ")
    assert message.endswith("data.path=FILE_OR_FOLDER")
    return message


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("first line\nsecond line", response=response)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (NoNetworkError("Name or service not known"), "no network"),
        (TimeoutError(), "no network"),
        (errors.OfflineModeIsEnabled("offline"), "offline mode is on"),
        (http_error(errors.GatedRepoError, 403), "access is gated"),
        (http_error(errors.RepositoryNotFoundError, 401), "no such data set"),
        (http_error(errors.RevisionNotFoundError, 404), "no such revision"),
        (http_error(errors.RemoteEntryNotFoundError, 404), "no such file there"),
        (http_error(errors.HfHubHTTPError, 503), "first line; try later"),
        (errors.HFValidationError("Repo id must be …"), "Repo id must be"),
    ],
)
def test_every_failure_of_the_hub_is_one_line_that_offers_local_files(
    monkeypatch: pytest.MonkeyPatch, problem: Exception, words: str
) -> None:
    assert words in hub_message(monkeypatch, problem)


def test_a_downloaded_copy_is_used_when_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def no_network(*_: Any, **__: Any) -> None:
        raise NoNetworkError("no route")

    def cached(*_: Any, **options: Any) -> str:
        asked.append(options)
        return "/cache/snapshots/abc/test.jsonl.gz"

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_network)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    assert hub_file("a/b", "test.jsonl.gz", "v1", "data.path") == Path("/cache/snapshots/abc/test.jsonl.gz")
    assert asked == [{"repo_type": "dataset", "revision": "v1", "local_files_only": True}]


def test_the_location_names_the_commit_that_was_downloaded() -> None:
    path = Path("/cache/datasets--a--b/snapshots/09be8c5/sub/test.jsonl.gz")
    assert hub_location("a/b", path, "main") == "hub:a/b@09be8c5"
    assert hub_location("a/b", Path("/elsewhere/test.jsonl.gz"), None) == "hub:a/b@main"


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_real_client_does_not_try_again_and_again_without_a_network(tmp_path: Path, offline: str) -> None:
    """A port of this machine whose connections are cut stands in for the hub."""
    script = (
        "from datamodules.files.jsonl import hub_file\n"
        "from tiltmeter.errors import UserError\n"
        "try:\n    hub_file('Anthropic/hh-rlhf', 'harmless-base/test.jsonl.gz', None, 'data.path')\n"
        "except UserError as problem:\n    raise SystemExit(str(problem))\n"
    )
    tries: list[object] = []
    with TCPServer(("127.0.0.1", 0), lambda *who: tries.append(who)) as cuts:
        threading.Thread(target=cuts.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{cuts.server_address[1]}", "HF_HUB_OFFLINE": offline}
        known = os.environ | hub | {"HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", script]
        run = subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True, check=False)
        cuts.shutdown()
    assert len(tries) in ((1, 2) if offline == "0" else (0,)), "the client alone would try six times"
    assert run.returncode == 1
    assert run.stderr.strip().count("\n") == 0, run.stderr
    assert run.stderr.startswith("data.path: can't get harmless-base/test.jsonl.gz of Anthropic/hh-rlhf")
    assert jsonl.METADATA_TIMEOUT_S <= 5
