"""Models that a run keeps: the sha256 of their files is in its provenance.json, and compared when one is opened."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from rich import get_console

from tiltmeter.errors import UserError
from tiltmeter.files import sha256_of, write_json

PROVENANCE = "provenance.json"
FILES, DATA = "files_sha256", "data_sha256"
"""Its keys: path from the run folder → sha256 of a file; split → sha256 of its token ids."""
MADE_FROM = "made_from.json"
"""File of a model that was made once and is found again: what it was made from, and the sha256 of its files."""
_LARGE = 2**30


def hashes_of(folder: Path, name: str | None = None) -> dict[str, str]:
    """sha256 of a folder's files, each by its path from the folder above.

    Args:
        name: that the folder will have.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as threads:
        found = dict(zip(files, threads.map(sha256_of, files), strict=True))
    return {f"{name or folder.name}/{path.relative_to(folder).as_posix()}": digest for path, digest in found.items()}


def read_provenance(run_dir: Path) -> dict[str, Any]:
    """A run's provenance.json; empty where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = run_dir / PROVENANCE
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({str(error)[:80]}); restore it, or remove it") from error
    if not isinstance(said, dict) or not all(isinstance(said.get(key, {}), dict) for key in (FILES, DATA)):
        raise UserError(f"{path}: damaged (expected a table, and tables of sha256 in it); restore it, or remove it")
    return said


def kept_hashes(run_dir: Path) -> dict[str, str]:
    """Hashes of a run's model files in its provenance.json; nothing where there is none, or an older one."""
    found: dict[str, str] = read_provenance(run_dir).get(FILES, {})
    return found


def record_kept(run_dir: Path, folder: Path, name: str) -> None:
    """Write into a run's provenance.json what a model's folder holds, before it gets the name that it is opened by."""
    said = read_provenance(run_dir)
    others = {file: digest for file, digest in said.get(FILES, {}).items() if file.partition("/")[0] != name}
    write_json(run_dir / PROVENANCE, {**said, FILES: others | hashes_of(folder, name)})


def record_made(folder: Path, name: str, **facts: Any) -> None:
    """Write into a model's folder what it was made from, and what it holds, before it gets the name that it is found by."""
    write_json(folder / MADE_FROM, {**facts, FILES: hashes_of(folder, name)})


def check_made(folder: Path) -> None:
    """Refuse a model that was made once and is not as it was written; nothing is known of one without :data:`MADE_FROM`.

    Raises:
        UserError: a file is missing or another one, or the record is damaged.
    """
    path, cure = folder / MADE_FROM, f"remove {folder} to have it made again"
    try:
        expected = json.loads(path.read_text(encoding="utf-8")).get(FILES, {})
    except FileNotFoundError:  # of an earlier version
        return
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({str(error)[:80]}); {cure}") from error
    check_files(folder.parent, expected, said_by=path, cure=cure)


def check_kept(folder: Path) -> None:
    """Refuse a model of a run whose files aren't those that the run wrote; nothing is known of other folders.

    Raises:
        UserError: a file is missing or another one; says which, and both hashes.
    """
    folder = folder.resolve()
    expected = {k: v for k, v in kept_hashes(folder.parent).items() if k.partition("/")[0] == folder.name}
    check_files(folder.parent, expected, said_by=folder.parent / PROVENANCE, cure="restore it from a copy, or take its "
                "line out there if it is meant to be another one")  # fmt: skip


def check_files(root: Path, expected: Mapping[str, str], *, said_by: Path, cure: str) -> None:
    """Compare files with their sha256.

    Args:
        root: what their paths start from.
        said_by: the file that the hashes are from.
        cure: what to do about one that differs.

    Raises:
        UserError: a file is missing or another one.
    """
    paths = {name: root / name for name in expected}
    for name, path in paths.items():
        if not path.is_file():
            raise UserError(f"{path}: no such file, but {said_by} has its sha256 {expected[name][:12]}…; {cure}")
    if (size := sum(path.stat().st_size for path in paths.values())) > _LARGE:
        get_console().print(f"Comparing {size / 2**30:.1f} GiB below {root} with {said_by.name} …", soft_wrap=True)
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(_sha256_now, paths.values()))
    for (name, path), digest in zip(paths.items(), found, strict=True):
        if digest != expected[name]:
            raise UserError(
                f"{path}: changed since it was written: expected sha256 {expected[name][:12]}…, as {said_by} says, found "
                f"{digest[:12]}…; {cure}"
            )


def _sha256_now(path: Path) -> str:
    """sha256 of a file, computed once in a process: models are opened several times there, and hashed once."""
    status = path.stat()
    return _sha256(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@cache
def _sha256(path: Path, *identity: int) -> str:
    return sha256_of(path)
