"""Rows of local `.jsonl` / `.jsonl.gz` files, read strictly, and single files of the Hugging Face hub.

Everything that can be wrong with a file ends in one UserError, ``file:line:column: what``; nothing is skipped unasked.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tiltmeter.errors import UserError
from tiltmeter.plain_text import did_you_mean

SUFFIXES = (".jsonl", ".jsonl.gz")
EXPECTED = "expected .jsonl, .jsonl.gz or a folder of them"
METADATA_TIMEOUT_S = 5.0

_GZIP_MAGIC = b"\x1f\x8b"
_LFS_POINTER = b"version https://git-lfs"
_UTF8_BOM = b"\xef\xbb\xbf"


def stem(path: Path) -> str:
    """File name without its suffix, ``.jsonl.gz`` being one.

    >>> stem(Path("hh/harmless-base_test.jsonl.gz"))
    'harmless-base_test'
    """
    return path.name.removesuffix(".gz").rpartition(".")[0]


def files_named(files: Sequence[Path], part: str | None, key: str, folder: Path) -> list[Path]:
    """Files of a folder whose name contains a part; None: all. Raises UserError: none does."""
    found = [file for file in files if part is None or part in stem(file)]
    if part is not None and not found:
        hint = did_you_mean(part, map(stem, files), cutoff=0.4)
        names = ", ".join(file.name for file in files)
        raise UserError(f"{key}: no file with {part!r} in its name in {folder} (there: {names}){hint}")
    return found


def list_files(path: str | Path, key: str = "data.path") -> list[Path]:
    """The file itself, or every ``.jsonl`` / ``.jsonl.gz`` directly in a folder, sorted by name; hidden files left out.

    Args:
        path: One file or one folder; ``~`` is expanded.
        key: Configuration key named in errors.

    Raises:
        UserError: Nothing there, another kind of file, a folder without such files, or one name both plain and gzipped.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        files = sorted(f for f in root.iterdir() if _is_jsonl(f))
        if not files:
            raise UserError(f"{key}: no .jsonl or .jsonl.gz file in folder {path}")
    elif not root.exists():
        raise UserError(f"{key}: no such file: {path} ({EXPECTED})")
    elif not root.name.endswith(SUFFIXES):
        raise UserError(f"{key}: not a JSONL file by its name: {path} ({EXPECTED})")
    else:
        files = [root]
    if twins := sorted(name for name, n in Counter(map(stem, files)).items() if n > 1):
        raise UserError(f"{key}: {path} has {twins[0]}.jsonl and {twins[0]}.jsonl.gz, the same data twice? Keep one")
    return files


def _refuse(error: UserError) -> None:
    raise error


def read_rows(
    path: str | Path, on_malformed: Callable[[UserError], None] = _refuse
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) for every line of one file; gzip exactly when the name ends in ``.gz``.

    A byte-order mark, CRLF line ends and empty lines are accepted; empty lines count in the numbering.

    Args:
        on_malformed: called with the error of a line that is no JSON object; where it returns, the line is left out.

    Raises:
        UserError: ``file:line:column: what`` for bad JSON, a row that is no object, invalid UTF-8 or half a surrogate
            pair; ``file: what`` for an empty, unreadable or damaged file, a wrong suffix, or a Git LFS pointer.
    """
    n_rows = 0
    for line_number, raw in enumerate(_raw_lines(Path(path)), start=1):
        if raw.strip():
            n_rows += 1
            try:
                row = _parse(raw, f"{path}:{line_number}")
            except UserError as error:
                on_malformed(error)
                continue
            yield line_number, row
    if n_rows == 0:
        raise UserError(f"{path}: empty file (expected one JSON object per line)")


def hub_file(repo: str, filename: str, revision: str | None, key: str) -> Path:
    """Local path of one file of a data set on the Hugging Face hub, downloaded on first use.

    One metadata request without retries comes first, so that a machine without network answers in seconds instead of
    after the client's six attempts. Without network an already downloaded copy is used.

    Args:
        repo: Data set, for example ``Anthropic/hh-rlhf``.
        filename: Path inside the data set.
        revision: Branch, tag or commit; None for the newest.
        key: Configuration key that offers local files instead, named in errors.

    Raises:
        UserError: Any failure: no network, offline mode, unknown or gated data set, unknown file or revision.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(repo, filename, repo_type="dataset", revision=revision)
    try:
        get_hf_file_metadata(url, timeout=METADATA_TIMEOUT_S)
    except Exception as problem:  # the client raises its own, httpx's and OSErrors; each must become one line
        if not may_use_cache(problem):
            raise UserError(hub_failure(repo, filename, revision, key, problem)) from problem
        try:
            cached = hf_hub_download(repo, filename, repo_type="dataset", revision=revision, local_files_only=True)
        except Exception:
            raise UserError(hub_failure(repo, filename, revision, key, problem)) from problem
        return Path(cached)
    try:
        downloaded = hf_hub_download(
            repo, filename, repo_type="dataset", revision=revision, etag_timeout=METADATA_TIMEOUT_S
        )
    except Exception as problem:
        raise UserError(hub_failure(repo, filename, revision, key, problem)) from problem
    return Path(downloaded)


def hub_location(repo: str, path: Path, revision: str | None) -> str:
    """``hub:REPO@COMMIT`` of a file that ``hub_file`` returned; the asked revision where the commit is not in the path.

    >>> hub_location("a/b", Path("hub/datasets--a--b/snapshots/09be8c5/train.jsonl.gz"), None)
    'hub:a/b@09be8c5'
    """
    parts = path.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else revision or "main"
    return f"hub:{repo}@{commit}"


def _is_jsonl(path: Path) -> bool:
    return path.is_file() and path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Lines as bytes without their end and without the byte-order mark; every way of not being readable is named."""
    line_number = 0
    try:
        check_head(path)
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as lines:
            for line_number, raw in enumerate(lines, start=1):
                line = raw.rstrip(b"\r\n")
                yield line.removeprefix(_UTF8_BOM) if line_number == 1 else line
    except FileNotFoundError as problem:
        raise UserError(f"{path}: no such file ({EXPECTED})") from problem
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        raise UserError(
            f"{path}: damaged gzip data after line {line_number} ({problem}); get the file again"
        ) from problem
    except OSError as problem:
        raise UserError(f"{path}: can't be read: {problem.strerror or problem}") from problem


def check_head(path: Path) -> None:
    """Refuse a file that is something else than its name says: a Git LFS pointer, gzip data or none. Raises UserError."""
    with path.open("rb") as file:
        head = file.read(len(_LFS_POINTER))
    if head.startswith(_LFS_POINTER):
        raise UserError(f"{path}: is a Git LFS pointer, not the data; run `git lfs pull` where it came from")
    is_gzip = head.startswith(_GZIP_MAGIC)
    if head and path.name.endswith(".gz") and not is_gzip:
        raise UserError(f"{path}: is not gzip data (if it is plain text, name it {stem(path)}.jsonl)")
    if is_gzip and not path.name.endswith(".gz"):
        raise UserError(f"{path}: is gzip data; name it {path.name}.gz")


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"))
        if b"\\u" in raw:  # an escaped half of a surrogate pair decodes here and fails later, in the tokenizer
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as problem:
        raise UserError(
            f"{where}:{problem.start + 1}: invalid UTF-8, byte 0x{raw[problem.start]:02x}; save the file as UTF-8"
        ) from problem
    except UnicodeEncodeError as problem:
        raise UserError(f"{where}: half a surrogate pair (\\ud8xx escape), which is not valid text") from problem
    except json.JSONDecodeError as problem:
        raise UserError(f"{where}:{problem.colno}: bad JSON: {problem.msg}") from problem
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{where}: bad JSON: {problem}") from problem
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {_json_type(row)}")
    return row


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def may_use_cache(problem: Exception) -> bool:
    """True when the hub could not be asked; false when it answered that there is no such thing."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(problem, HfHubHTTPError):
        return problem.response is None or problem.response.status_code >= 500
    return not isinstance(problem, HFValidationError)


def hub_failure(repo: str, filename: str, revision: str | None, key: str, problem: Exception) -> str:
    """One line on why something of a data set can't be had from the hub, and what to do; ``key`` offers local files instead."""
    from huggingface_hub import errors

    instead = f"or give local files: {key}=FILE_OR_FOLDER"
    at = f"{repo}@{revision}" if revision else repo
    start = f"{key}: can't get {filename} of {at} from the Hugging Face hub"
    if isinstance(problem, errors.OfflineModeIsEnabled):
        return f"{start}: offline mode is on (HF_HUB_OFFLINE) and there is no downloaded copy; unset it {instead}"
    if isinstance(problem, errors.GatedRepoError):
        return f"{start}: access is gated; accept its terms on the hub and log in (hf auth login), {instead}"
    if isinstance(problem, errors.RevisionNotFoundError):
        return f"{start}: no such revision; correct data.revision {instead}"
    if isinstance(problem, errors.EntryNotFoundError) and isinstance(problem, errors.HfHubHTTPError):
        return f"{start}: no such file there; check data.revision {instead}"
    if isinstance(problem, errors.RepositoryNotFoundError):
        return f"{start}: no such data set, or not visible without logging in (hf auth login), {instead}"
    first_line = (str(problem).strip().splitlines() or [type(problem).__name__])[0].rstrip(". ")
    if isinstance(problem, errors.HfHubHTTPError | errors.HFValidationError):
        return f"{start}: {first_line}; try later {instead}"
    return f"{start}: no network and no downloaded copy ({first_line}); connect {instead}"
