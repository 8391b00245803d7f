"""Reads an offline ``.wandb`` file: the LevelDB log format (blocks of 32 KiB, CRC-32C) of protobuf records.

Format: https://github.com/google/leveldb/blob/main/doc/log_format.md, behind a header of seven bytes (``:W&B``, magic, version).
"""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record

from tests.processes import HANGS

_HEADER_BYTES, _BLOCK, _CHUNK_HEADER = 7, 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[Record]:
    """Every record of a file, in order."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", f"{path} is no wandb file"
    at, parts = _HEADER_BYTES, b""
    while at + _CHUNK_HEADER <= len(data):
        left_in_block = _BLOCK - at % _BLOCK
        if left_in_block < _CHUNK_HEADER:
            at += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _CHUNK_HEADER])
        chunk = data[at + _CHUNK_HEADER : at + _CHUNK_HEADER + length]
        at += _CHUNK_HEADER + length
        parts = chunk if kind in (_FULL, _FIRST) else parts + chunk
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


def wait_until_written(path: Path, *, seconds: float = HANGS) -> None:
    """Until a finished run's file ends with its exit record: W&B's own process writes the last block after ``finish``."""
    for _ in range(int(seconds / 0.1)):
        try:
            if any(record.WhichOneof("record_type") == "exit" for record in read_records(path)):
                return
        except DecodeError:
            pass  # the last record is there in part
        time.sleep(0.1)
    raise AssertionError(f"{path}: no exit record after {seconds} seconds")


def history_rows(path: Path) -> list[dict[str, Any]]:
    """What was logged, one dictionary a call of ``log``."""
    rows = []
    for record in read_records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def run_config(path: Path) -> dict[str, Any]:
    """The configuration that was sent with the run."""
    config: dict[str, Any] = {}
    for record in read_records(path):
        kind = record.WhichOneof("record_type")
        update = record.run.config if kind == "run" else record.config if kind == "config" else None
        for item in [] if update is None else update.update:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return config


def metric_definitions(path: Path) -> dict[str, str]:
    """Metric (or glob) → the metric of its x axis."""
    found = [r.metric for r in read_records(path) if r.WhichOneof("record_type") == "metric"]
    return {m.name or m.glob_name: m.step_metric for m in found}
