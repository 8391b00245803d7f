"""Rows of tables that people have: JSON, JSON Lines, parquet, CSV, TSV, folders of `save_to_disk`, data sets of the hub."""

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.files.jsonl import (
    METADATA_TIMEOUT_S,
    check_head,
    files_named,
    hub_failure,
    may_use_cache,
    read_rows,
    stem,
)
from tiltmeter.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv", ".tsv")
EXPECTED = f"expected {', '.join(SUFFIXES)}, a folder of them, or a folder written by save_to_disk"
OnMalformed = Callable[[UserError], None]
Rows = Iterator[tuple[int, dict[str, Any]]]

_SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?$")
_LONGEST_CELL = 2**31 - 1


class Table(NamedTuple):
    """One file, saved data set or split of the hub."""

    name: str
    """Its own among the tables of a load, and the same on every machine: the file's name without suffix."""
    location: str
    rows: Callable[[OnMalformed], Rows]
    """Yields (number from 1, row); is called with what becomes of rows that can't be read."""

    @property
    def whole(self) -> str:
        """Name of the data set that a shard such as ``train-00000-of-00004`` is a part of."""
        return _SHARD.sub("", self.name)


def local_tables(paths: Sequence[str], split: str | None, key: str = "data.path") -> tuple[list[Table], list[str]]:
    """The tables of files and folders, in this order and by name inside a folder, and the names of those left out.

    Args:
        paths: files, folders of files, or folders written by ``save_to_disk``; ``~`` is expanded.
        split: of a saved data set the split to read; of a folder the files whose name contains it; None: the only split or
            ``train``, all files.
        key: configuration key named in errors.

    Raises:
        UserError: nothing there, another kind of file, no such split, or one name twice.
    """
    tables: list[Table] = []
    left_out: list[str] = []
    for path in paths:
        found, others = _tables_of(Path(path).expanduser(), split, key)
        tables += found
        left_out += others
    return unique_names(tables, key), left_out


def unique_names(tables: Sequence[Table], key: str) -> list[Table]:
    """Tables under names of their own: those that share one take their folder's in front. Raises UserError: one is there twice."""
    counts = Counter(table.name for table in tables)
    named = [t._replace(name=f"{Path(t.location).parent.name}/{t.name}") if counts[t.name] > 1 else t for t in tables]
    for name, n in Counter(table.name for table in named).items():
        if n > 1:
            twins = " and ".join(table.location for table in named if table.name == name)
            raise UserError(f"{key}: {twins}: the same data twice? Keep one, or give them names that differ")
    return named


def _tables_of(root: Path, split: str | None, key: str) -> tuple[list[Table], list[str]]:
    if not root.exists():
        raise UserError(f"{key}: no such file: {root} ({EXPECTED})")
    if root.is_file():
        return [_only_table(root, split, key)], []
    if (root / "dataset_dict.json").is_file() or (root / "dataset_info.json").is_file():
        return _saved_table(root, split, key)
    return _tables_in(root, split, key)


def _tables_in(folder: Path, split: str | None, key: str) -> tuple[list[Table], list[str]]:
    found = sorted(f for f in folder.iterdir() if f.is_file() and f.name.endswith(SUFFIXES) and f.name[0] != ".")
    if not found:
        raise UserError(f"{key}: no such file in folder {folder} ({EXPECTED})")
    chosen = files_named(found, split, "data.split", folder)
    return [_file_table(f) for f in chosen], [f.name for f in found if f not in chosen]


def _only_table(file: Path, split: str | None, key: str) -> Table:
    if not file.name.endswith(SUFFIXES):
        raise UserError(f"{key}: not a table by its name: {file} ({EXPECTED})")
    if split is not None:
        raise UserError(f"data.split={split}: {file} is one file; leave it out, or give a folder")
    return _file_table(file)


def _file_table(path: Path) -> Table:
    read = {".json": _json_rows, ".parquet": _parquet_rows, ".csv": _csv_rows, ".tsv": _csv_rows}.get(
        path.suffix, read_rows
    )

    def rows(on_malformed: OnMalformed) -> Rows:
        check_head(path)
        return read(path, on_malformed)

    return Table(stem(path), str(path), rows)


def _json_rows(path: Path, on_malformed: OnMalformed) -> Rows:
    """Objects of one array, or, as ``datasets`` writes them, one a line."""
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"["):
        yield from read_rows(path, on_malformed)
        return
    try:
        array = json.loads(text.decode())
        # an escaped half of a surrogate pair would fail later, in the tokenizer
        json.dumps(array, ensure_ascii=False).encode()
    except json.JSONDecodeError as problem:
        raise UserError(f"{path}:{problem.lineno}:{problem.colno}: bad JSON: {problem.msg}") from problem
    except (UnicodeDecodeError, UnicodeEncodeError) as problem:
        raise UserError(f"{path}: invalid UTF-8, or half a surrogate pair ({problem.reason})") from problem
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path}: bad JSON: {problem}") from problem
    for number, row in enumerate(array, start=1):
        if isinstance(row, dict):
            yield number, row
        else:
            on_malformed(UserError(f"{path}: entry {number}: expected a JSON object, got {str(row)[:40]!r}"))


def _parquet_rows(path: Path, _: OnMalformed) -> Rows:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield (number := number + 1), row
    except (ArrowException, OSError) as problem:
        what = str(problem).strip().splitlines()[0]
        raise UserError(
            f"{path}: damaged or no parquet file after row {number} ({what}); get the file again"
        ) from problem


def _csv_rows(path: Path, on_malformed: OnMalformed) -> Rows:
    """Rows under the names of the first line; a cell that is JSON of a message, or of several, is read as such."""
    csv.field_size_limit(min(sys.maxsize, _LONGEST_CELL))
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            names = next(lines, [])
            for number, cells in enumerate((cells for cells in lines if cells), start=1):
                if len(cells) == len(names):
                    yield number, dict(zip(names, map(_cell, cells), strict=True))
                else:
                    where = f"{path}:{lines.line_num}"
                    on_malformed(
                        UserError(f"{where}: expected {len(names)} cells as in the first line, got {len(cells)}")
                    )
    except csv.Error as problem:
        raise UserError(f"{path}:{lines.line_num}: {problem}; quote cells with line breaks or quotes") from problem
    except UnicodeDecodeError as problem:
        raise UserError(f"{path}: invalid UTF-8 ({problem.reason}); save the file as UTF-8") from problem


def _cell(text: str) -> Any:
    if text.startswith(("[{", '{"')):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text or None


def _saved_table(root: Path, split: str | None, key: str) -> tuple[list[Table], list[str]]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(root))
    except Exception as problem:  # of pyarrow, fsspec, json …: all mean the same here
        raise UserError(
            f"{key}: {root} can't be read as a folder of save_to_disk ({_first_line(problem)})"
        ) from problem
    if isinstance(saved, datasets.Dataset):
        if split is not None:
            raise UserError(f"data.split={split}: {root} has no splits; leave it out")
        return [Table(root.name, str(root), lambda _: enumerate(saved, start=1))], []
    name = split or (next(iter(saved)) if len(saved) == 1 else "train")
    if name not in saved:
        raise UserError(f"data.split: no split {name!r} in {root} (there: {', '.join(saved)}); set data.split=NAME")
    table = Table(f"{root.name}_{name}", str(root / name), lambda _: enumerate(saved[name], start=1))
    return [table], [other for other in saved if other != name]


def hub_table(name: str, config: str | None, split: str | None, revision: str | None) -> Table:
    """One split of a data set on the Hugging Face hub, read by ``datasets``, which runs no code of the data set.

    Args:
        name: such as ``HuggingFaceH4/ultrafeedback_binarized``.
        config, split, revision: None: the only configuration, ``train``, the newest.

    Raises:
        UserError: no network and no downloaded copy, unknown or gated data set, configuration, split or revision, or a data
            set that is a script.
    """
    if Path(name).expanduser().exists() or name.count("/") > 1:
        raise UserError(
            f"data.name: expected a data set of the hub such as OWNER/NAME, got {name}; files are read by data.path="
        )
    split = split or "train"
    what = f"split {split}"
    commit = _hub_commit(name, revision, what)
    rows = _hub_rows(name, config, split, revision)
    table = "_".join(part for part in (name.rpartition("/")[2], config, split) if part)
    return Table(table, f"hub:{name}@{commit} {what}", lambda _: enumerate(rows, start=1))


def _hub_commit(name: str, revision: str | None, what: str) -> str:
    """Commit that a revision is now; without network the revision itself, where there is a copy."""
    import datasets
    from huggingface_hub import HfApi

    found: str | None = None
    try:
        found = HfApi().dataset_info(name, revision=revision, timeout=METADATA_TIMEOUT_S).sha
    except Exception as problem:  # the client raises its own, httpx's and OSErrors; each must become one line
        is_kept = (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
        if not may_use_cache(problem) or not is_kept:
            raise UserError(hub_failure(name, what, revision, "data.path", problem)) from problem
    return found or revision or "main"


def _hub_rows(name: str, config: str | None, split: str, revision: str | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as problem:
        if "scripts are no longer supported" in str(problem):
            raise UserError(
                f"data.name={name}: this data set is a script, and no code of data sets is run here; take the copy that the hub "
                "converted, data.revision=refs/convert/parquet, or give local files: data.path=FILE_OR_FOLDER"
            ) from problem
        if isinstance(problem, ValueError):  # an unknown configuration or split, with those there are
            raise UserError(f"data.name={name}: {_first_line(problem)}; set data.config= and data.split=") from problem
        raise UserError(hub_failure(name, f"split {split}", revision, "data.path", problem)) from problem


def _first_line(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0].rstrip(". ")
