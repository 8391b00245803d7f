"""F8, F9 and F33 where checkpoints are written and read: failures are told, and only tensors come in."""

import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_modules.checkpoint_io import CommittedCheckpointIO, check_sharded
from tiltmeter.checkpoint_files import commit, data_of, target_of, verify
from tiltmeter.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # shards of one process
STATE = {"global_step": 3, "state_dict": {"weight": torch.arange(4.0)}}


class Payload:
    """What a hostile file holds: reading it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.canary),)


def writer() -> tuple[CommittedCheckpointIO, list[tuple[Path, OSError]]]:
    failed: list[tuple[Path, OSError]] = []
    return CommittedCheckpointIO({}, on_failure=lambda path, error: failed.append((path, error))), failed


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    io, failed = writer()
    io.save_checkpoint(STATE, tmp_path / "last.ckpt")
    manifest = verify(tmp_path / "last.ckpt")
    assert (manifest.step, manifest.world_size) == (3, 1)
    read = io.load_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(read["state_dict"]["weight"], STATE["state_dict"]["weight"])  # type: ignore[index]
    assert failed == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_f8_f9_a_save_that_fails_is_told_and_the_one_before_stays(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io, failed = writer()
    io.save_checkpoint(STATE, tmp_path / "last.ckpt")

    def fail(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        io.save_checkpoint(STATE | {"global_step": 6}, tmp_path / "last.ckpt")
    ((path, told),) = failed
    assert path == tmp_path / "last.ckpt"
    assert io.failure is told
    assert str(told).startswith(f"{path}: could not be written ({error.strerror}")
    assert verify(tmp_path / "last.ckpt").step == 3
    assert not list(tmp_path.glob(".*"))
    io.save_checkpoint(STATE | {"global_step": 9}, tmp_path / "last.ckpt")
    assert io.failure is None
    assert verify(tmp_path / "last.ckpt").step == 9


def test_a_name_that_lightning_gives_up_goes(tmp_path: Path) -> None:
    io, _ = writer()
    for step in range(4):
        io.save_checkpoint(STATE | {"global_step": step}, tmp_path / f"{step}.ckpt")
    assert len(data_of(tmp_path)) == 4
    io.remove_checkpoint(tmp_path / "0.ckpt")
    assert [path.name for path in data_of(tmp_path)] == [f"{n}-step=00000{n}.ckpt" for n in (1, 2, 3)]


@pytest.mark.parametrize("where", ["a value", "a key that Lightning makes objects of"])
def test_f33_a_hostile_file_with_a_perfect_manifest_runs_nothing(where: str, tmp_path: Path) -> None:
    io, canary = writer()[0], tmp_path / "canary"
    hostile: dict[str, Any] = STATE | (
        {"more": Payload(canary)}
        if where == "a value"
        else {"hyper_parameters": {"_instantiator": "os.mkdir", "_class_path": "os.mkdir", "path": str(canary)}}
    )
    io.save_checkpoint(hostile, tmp_path / "checkpoints" / "last.ckpt")
    verify(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"was not (read|loaded)"):
        io.load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert not canary.exists()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder as a sharded run saves it: tensors, a value that is none, and Lightning's own file."""

    def write(folder: Path) -> None:
        dcp.save({"weight": torch.arange(4.0), "lr": 0.1}, checkpoint_id=folder, no_dist=True)
        torch.save({"global_step": 3}, folder / "meta.pt")

    commit(tmp_path / "last.ckpt", write, step=3, made_by={})
    return target_of(tmp_path / "last.ckpt")


def test_f8_shards_that_cannot_be_written_are_told_and_the_ones_before_stay(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io, failed = writer()
    error = OSError(28, "No space left on device")

    def fail(descriptor: int) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.filesystem.os.fsync", fail)
        save = partial(dcp.save, {"weight": torch.arange(4.0)}, no_dist=True)
        io.save_shards(lambda folder: save(checkpoint_id=folder), shards.with_name("last.ckpt"), step=6)
    ((path, told),) = failed
    assert path == shards.with_name("last.ckpt")
    assert "No space left on device" in str(told)
    assert verify(shards.with_name("last.ckpt")).step == 3
    assert not list(shards.parent.glob(".*"))


def test_shards_pass_and_one_process_says_who_reads_them(shards: Path) -> None:
    check_sharded(shards)
    with pytest.raises(UserError, match="resume with trainer=fsdp"):
        writer()[0].load_checkpoint(shards)


@pytest.mark.parametrize("where", ["index", "dotted name in the index", "value", "place", "meta"])
def test_f33_hostile_shards_run_nothing(where: str, shards: Path, tmp_path: Path) -> None:
    canary, index = tmp_path / "canary", shards / ".metadata"
    if where == "index":
        index.write_bytes(pickle.dumps(Payload(canary)))
    elif where == "dotted name in the index":  # reaches os through a module that the index may name
        index.write_bytes(
            b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x08os.mkdir\x93"
            + b"\x8c"
            + bytes([len(str(canary))])
            + str(canary).encode()
            + b"\x85R."
        )
    elif where == "meta":
        torch.save({"global_step": Payload(canary)}, shards / "meta.pt")
    else:
        _replace_value(index, shards, canary, elsewhere=where == "place")
    with pytest.raises(UserError, match="was not read"):
        check_sharded(shards)
    assert not canary.exists()


def _replace_value(index: Path, shards: Path, canary: Path, *, elsewhere: bool) -> None:
    """Let the learning rate be a payload, in the folder or beside it."""
    metadata = pickle.loads(index.read_bytes())
    (place,) = [place for place in metadata.storage_data if place.fqn == "lr"]
    info = metadata.storage_data[place]
    payload = shards / ("../payload" if elsewhere else "payload")
    torch.save(Payload(canary), payload)
    info.relative_path, info.offset, info.length = payload.name, 0, payload.stat().st_size
    if elsewhere:
        info.relative_path = "../payload"
    index.write_bytes(pickle.dumps(metadata))
