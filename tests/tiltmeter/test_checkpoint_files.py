"""F6 and F7 without a trainer: a save that is killed before any of its system calls, and every kind of damage."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.processes import HANGS, ROOT
from tests.tiltmeter.interrupted_saves import CONTENT, save, write_file, write_folder
from tiltmeter.checkpoint_files import (
    MANIFEST,
    DamagedCheckpoint,
    data_of,
    newest_valid,
    prune,
    remove_unfinished,
    verify,
)


@pytest.fixture(params=[write_file, write_folder], ids=["file", "folder"])
def write(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    writer: Callable[[Path], None] = request.param
    return writer


def test_a_link_points_to_the_newest_and_the_one_before_stays(tmp_path: Path, write: Callable[[Path], None]) -> None:
    best = save(tmp_path, 3, name="best", write=write)
    saved = [save(tmp_path, step, write=write) for step in (3, 6, 9)]
    assert verify(tmp_path / "last.ckpt").step == 9
    assert verify(tmp_path / "best.ckpt").step == 3
    assert newest_valid(tmp_path) == (saved[-1], [])
    assert set(data_of(tmp_path)) == {best, saved[-1], saved[-2]}
    assert remove_unfinished(tmp_path) == []


def test_the_same_step_saved_again_replaces_nothing_before_it_is_whole(tmp_path: Path) -> None:
    first, second = save(tmp_path, 3), save(tmp_path, 3)
    assert [path.name for path in (first, second)] == ["last-step=000003.ckpt", "last-step=000003-2.ckpt"]
    assert newest_valid(tmp_path)[0] == second


def test_a_name_that_is_given_up_frees_its_data_once_newer_ones_are_there(tmp_path: Path) -> None:
    old = save(tmp_path, 1, name="best")
    save(tmp_path, 2)
    save(tmp_path, 3)
    assert old.exists()
    (tmp_path / "best.ckpt").unlink()
    prune(tmp_path)
    assert not old.exists()


def damage(data: Path, kind: str) -> None:
    file = data / ".metadata" if data.is_dir() else data
    manifest = data.with_name(data.name + MANIFEST)
    if kind == "truncated":
        os.truncate(file, 10)
    elif kind == "empty":
        os.truncate(file, 0)
    elif kind == "no manifest":
        manifest.unlink()
    elif kind == "cut manifest":
        os.truncate(manifest, 40)
    elif kind == "other step":
        content = json.loads(manifest.read_text(encoding="utf-8"))
        content["manifest"]["step"] += 1
        manifest.write_text(json.dumps(content), encoding="utf-8")
    elif kind == "file gone":
        file.unlink()
    elif kind == "unknown file":
        (data / "more").write_bytes(b"")
    else:
        file.write_bytes(CONTENT[:-1] + b"\0")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("truncated", "has 10 bytes, 64 were written"),
        ("empty", "has 0 bytes"),
        ("changed", "has changed since it was written"),
        ("no manifest", "has no manifest"),
        ("cut manifest", "a manifest that can't be read"),
        ("other step", "a manifest that was changed"),
        ("file gone", "lacks"),
        ("unknown file", "which its manifest doesn't know"),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path: Path, kind: str, said: str) -> None:
    before, newest = (save(tmp_path, step, write=write_folder) for step in (3, 6))
    damage(newest, kind)
    with pytest.raises(DamagedCheckpoint, match=said):
        verify(newest)
    found, skipped = newest_valid(tmp_path)
    assert found == before
    assert len(skipped) == 1
    assert str(newest) in skipped[0]
    assert said in skipped[0]
    assert newest.exists(), "what is damaged may still be of use to somebody: it is not removed"


def test_where_nothing_is_valid_nothing_is_found(tmp_path: Path) -> None:
    damage(save(tmp_path, 3), "empty")
    (tmp_path / "foreign.ckpt").write_bytes(CONTENT)
    found, skipped = newest_valid(tmp_path)
    assert found is None
    assert len(skipped) == 2


@settings(max_examples=30)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), of_manifest=st.booleans())
def test_no_flipped_bit_changes_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, where: float, bit: int, of_manifest: bool
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    data = save(folder, 3)
    whole = verify(data)
    file = data.with_name(data.name + MANIFEST) if of_manifest else data
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    file.write_bytes(content)
    try:
        assert verify(data) == whole, "a flip in the manifest's white space, at most"
        assert of_manifest
    except DamagedCheckpoint:
        pass


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    before = save(tmp_path, 3)

    def full(path: Path) -> None:
        path.write_bytes(CONTENT[:10])
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 6, write=full)
    assert verify(tmp_path / "last.ckpt").step == 3
    assert data_of(tmp_path) == [before]
    assert not list(tmp_path.glob(".*"))


def test_f6_killed_before_any_of_its_calls_a_save_leaves_a_valid_newest_one(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    start = tmp_path / "start"
    for step in (3, 6):
        save(start, step, write=write)
    command = [sys.executable, "-m", "tests.tiltmeter.interrupted_saves", str(start), write.__name__]
    subprocess.run(command, cwd=ROOT, check=True, timeout=HANGS)
    folders = sorted(tmp_path.glob("killed-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert len(folders) > 15
    steps = []
    for folder in folders:
        found, skipped = newest_valid(folder)
        assert found is not None
        assert skipped == [], "what was interrupted looks like no checkpoint at all"
        steps.append(verify(found).step)
        assert verify(folder / "last.ckpt").step in (6, 9), "the link is never broken"
        remove_unfinished(folder)
        assert not list(folder.glob(".*"))
    for folder in folders[::5]:
        assert verify(save(folder, 12, write=write)).step == 12
        assert {verify(path).step for path in data_of(folder)} <= {6, 9, 12}
    assert steps == sorted(steps), "before the commit the old one, after it the new one"
    assert set(steps) == {6, 9}
    shutil.rmtree(tmp_path)
