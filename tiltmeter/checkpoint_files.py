"""Checkpoints that are whole or not there, and that are read only while every byte is the one that was written.

``last.ckpt`` is a link to ``last-step-000120.ckpt``, a file or a folder of shards; ``last-step-000120.ckpt.manifest.json``
beside it holds the sha256 of every file. Data and manifest are on disk before one rename commits them; the link moves
after that. Hashes tell damage from what was written, not who wrote it: what is read is still no more than tensors.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from tiltmeter.files import sha256_of, writing

MANIFEST = ".manifest.json"
_PARTIAL = ".partial-"
_N_NEWEST_KEPT = 2
"""Checkpoints that stay beside those with a link: one to go on from when the newest is found damaged."""


class DamagedCheckpoint(ValueError):
    """Damage to a checkpoint, worded as the end of a sentence that starts with its path."""


@dataclass(frozen=True)
class Manifest:
    """Record of what was written, by what, and how far training was."""

    step: int
    """Optimizer steps taken."""
    world_size: int
    """Processes that trained."""
    saved_at: str
    """UTC, ISO 8601."""
    made_by: dict[str, Any]
    """Versions and settings of the run."""
    files: dict[str, dict[str, Any]]
    """``bytes`` and ``sha256`` of each file, by its path from the folder of checkpoints."""


def commit(
    link: Path,
    write: Callable[[Path], object],
    *,
    step: int,
    world_size: int = 1,
    made_by: Mapping[str, Any],
    is_first: bool = True,
) -> None:
    """Write a checkpoint and let a link point to it; what was there before stays until then.

    Args:
        link: ``checkpoints/last.ckpt``, or another name there.
        write: fills the path that it is given, a file or a folder. Of several processes each calls this and waits for
            the others inside ``write``; only the first one commits.
        step, world_size, made_by: see :class:`Manifest`.
        is_first: this is the first process.

    Raises:
        FailedWrite: a full disk, no permission … Nothing new is left then.
    """
    partial = link.with_name(_PARTIAL + link.name)
    try:
        with writing(link):
            if is_first:
                link.parent.mkdir(parents=True, exist_ok=True)
                _remove(partial)
            write(partial)
            if is_first:
                _publish(partial, link, step=step, world_size=world_size, made_by=dict(made_by))
    finally:
        if is_first:
            with suppress(OSError):
                _remove(partial)


def _publish(partial: Path, link: Path, *, step: int, world_size: int, made_by: dict[str, Any]) -> None:
    data = _free_name(link, step)
    manifest = Manifest(
        step=step,
        world_size=world_size,
        saved_at=datetime.now(UTC).isoformat(),
        made_by=made_by,
        files=_describe(partial, data.name),
    )
    for path in [*_files_of(partial), *(path for path in partial.rglob("*") if path.is_dir()), partial]:
        _sync(path)
    try:
        _write_manifest(data, manifest)
        partial.rename(data)  # the commit
    except OSError:
        _manifest_of(data).unlink(missing_ok=True)
        raise
    _sync(data.parent)
    point(link, data)
    prune(data.parent)


def point(link: Path, data: Path) -> None:
    """Make ``link`` a relative link to ``data``, in one step."""
    temporary = link.with_name(f"{_PARTIAL}link-{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(data.name)
    temporary.replace(link)
    _sync(link.parent)


def prune(folder: Path) -> None:
    """Remove committed checkpoints that no link points to, except the newest two of all."""
    with_link = {path.readlink().name for path in folder.iterdir() if path.is_symlink()}
    for path in _newest_first(folder, [])[_N_NEWEST_KEPT:]:
        if path.name not in with_link:
            remove(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint that was committed; a half removed one looks like one that was never committed."""
    away = checkpoint.with_name(_PARTIAL + checkpoint.name)
    with suppress(OSError):  # tried again after the next commit
        _remove(away)
        checkpoint.rename(away)
        _manifest_of(checkpoint).unlink()
        _remove(away)


def verify(checkpoint: Path, *, contents: bool = True) -> Manifest:
    """The manifest of a checkpoint, or of what a link points to, all of whose files are as it says.

    Args:
        checkpoint: the path.
        contents: compare the sha256 of every file; false: names and sizes only.

    Raises:
        DamagedCheckpoint: the reason.
    """
    data = target_of(checkpoint)
    manifest = _read_manifest(data)
    if not data.exists():
        raise DamagedCheckpoint("is gone; only its manifest is there")
    sizes = {_name_in(data, file, data.name): file.stat().st_size for file in _files_of(data)}
    for name in sorted(manifest.files.keys() | sizes.keys()):
        if name not in sizes:
            raise DamagedCheckpoint(f"lacks {name}")
        if name not in manifest.files:
            raise DamagedCheckpoint(f"holds {name}, which its manifest doesn't know")
        if sizes[name] != manifest.files[name]["bytes"]:
            raise DamagedCheckpoint(
                f"is truncated or overwritten: {name} has {sizes[name]} bytes, {manifest.files[name]['bytes']} were written"
            )
    if contents:
        now = _describe(data, data.name)
        for name, written in manifest.files.items():
            if now[name]["sha256"] != written["sha256"]:
                raise DamagedCheckpoint(f"has changed since it was written: the sha256 of {name} is another")
    return manifest


def newest_valid(folder: Path, *, contents: bool = True) -> tuple[Path | None, list[str]]:
    """The checkpoint of a folder with the most steps that is as it was written, and why others were skipped.

    Args:
        folder: ``checkpoints/`` of a run.
        contents: see :func:`verify`.
    """
    skipped: list[str] = []
    for path in _newest_first(folder, skipped):
        try:
            verify(path, contents=contents)
        except DamagedCheckpoint as damage:
            skipped.append(f"{path} {damage}")
        else:
            return path, skipped
    return None, skipped


def target_of(checkpoint: Path) -> Path:
    """Target of a link, beside it; anything else is its own target."""
    return checkpoint.with_name(checkpoint.readlink().name) if checkpoint.is_symlink() else checkpoint


def data_of(folder: Path) -> list[Path]:
    """Files and folders that are checkpoints or ought to be, valid or not; no links."""
    found = sorted(folder.glob("[!.]*"))
    return [path for path in found if not path.is_symlink() and not path.name.endswith(MANIFEST)]


def remove_unfinished(folder: Path) -> list[Path]:
    """Remove what interrupted saves left behind, which is never a checkpoint, and return it. Nobody may be saving."""
    with_data = {_manifest_of(path) for path in data_of(folder)}
    found = [*folder.glob(f"{_PARTIAL}*"), *(path for path in folder.glob(f"[!.]*{MANIFEST}") if path not in with_data)]
    for path in found:
        _remove(path)
    return sorted(found)


def _newest_first(folder: Path, unreadable: list[str]) -> list[Path]:
    """Sort by steps taken, then by time; those without a readable manifest are added to ``unreadable``."""
    known: list[tuple[int, str, Path]] = []
    for path in data_of(folder):
        try:
            manifest = _read_manifest(path)
        except DamagedCheckpoint as damage:
            unreadable.append(f"{path} {damage}")
        else:
            known.append((manifest.step, manifest.saved_at, path))
    return [path for _, _, path in sorted(known, reverse=True)]


def _manifest_of(data: Path) -> Path:
    return data.with_name(data.name + MANIFEST)


def _read_manifest(data: Path) -> Manifest:
    path = _manifest_of(data)
    try:
        content = json.loads(path.read_bytes())
        if content["sha256"] != _sha256_of(content["manifest"]):
            raise DamagedCheckpoint("has a manifest that was changed since it was written")
        return Manifest(**content["manifest"])
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"has no manifest {path.name}, without which nobody knows whether it is whole"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DamagedCheckpoint):
            raise
        raise DamagedCheckpoint(f"has a manifest that can't be read ({type(error).__name__})") from error


def _write_manifest(data: Path, manifest: Manifest) -> None:
    content = asdict(manifest)
    path = _manifest_of(data)
    text = json.dumps(
        {"sha256": _sha256_of(content), "manifest": content}, indent=2, sort_keys=True, ensure_ascii=False
    )
    path.write_text(text + "\n", encoding="utf-8")
    _sync(path)


def _sha256_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _describe(data: Path, name: str) -> dict[str, dict[str, Any]]:
    """``Manifest.files`` of a file or folder as it is now, under the name that it has or will have."""

    def describe(file: Path) -> dict[str, Any]:
        return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}

    files = _files_of(data)
    with ThreadPoolExecutor() as threads:  # shards side by side: hashing lets other threads run
        return {
            _name_in(data, file, name): found for file, found in zip(files, threads.map(describe, files), strict=True)
        }


def _name_in(data: Path, file: Path, name: str) -> str:
    """Path of a file from the folder of checkpoints, for data of that name."""
    return (Path(name) / file.relative_to(data)).as_posix()


def _files_of(data: Path) -> list[Path]:
    return [path for path in sorted(data.rglob("*")) if path.is_file()] if data.is_dir() else [data]


def _free_name(link: Path, step: int) -> Path:
    """A free name for the data: ``last-step-000120.ckpt``, or ``…-2.ckpt`` when the same step was saved before."""
    for n in count(1):
        data = link.with_name(f"{link.stem}-step-{step:06d}{f'-{n}' if n > 1 else ''}{link.suffix}")
        if not data.exists():
            return data
    raise AssertionError


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """On the disk, not only on its way there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
