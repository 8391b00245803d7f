import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch.testing import assert_close

from tests.tiny_models import make_model, random_pairs
from tiltmeter.errors import UserError
from tiltmeter.pairs.batch import CHOSEN, PROMPT, REJECTED, TokenizedPair, collate_pairs
from tiltmeter.states.capture import HiddenStates, ReadPoint, read_hidden_states
from tiltmeter.states.snapshots import BASE, SnapshotReader, SnapshotWriter, epoch_name
from tiltmeter.states.state_pair import StatePair

IDS = {40: "hh/a", 41: "hh/b", 42: "hh/c"}
LAST, PROMPTS = ReadPoint("layer_01", "response_last"), ReadPoint("layer_01", "prompt_last")


def states(seed: int = 0, d: int = 4) -> dict[ReadPoint, HiddenStates]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.tensor([40, 40, 41, 41]), torch.tensor([CHOSEN, REJECTED] * 2)
    one = torch.tensor([40, 41]), torch.tensor([PROMPT] * 2)
    return {
        LAST: HiddenStates(torch.randn(4, d, generator=generator), *both),
        PROMPTS: HiddenStates(torch.randn(2, d, generator=generator), *one),
    }


def writer(folder: Path, **changes: Any) -> SnapshotWriter:
    return SnapshotWriter(folder, **({"dtype": "float32", "pair_ids": IDS, "about": {"model": "tiny"}} | changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_with_its_labels(tmp_path: Path, dtype: str) -> None:
    out = writer(tmp_path / "snapshots", dtype=dtype)
    for i, name in enumerate([BASE, epoch_name(0), epoch_name(1)]):
        assert out.write(name, states(i)) == tmp_path / "snapshots" / f"{name}.safetensors"
    reader = SnapshotReader(tmp_path / "snapshots")
    assert reader.names == ["base", "epoch=000", "epoch=001"]
    assert reader.points == [PROMPTS, LAST]
    assert reader.manifest.about == {"model": "tiny"}
    assert (reader.manifest.dtype, reader.manifest.d_model) == (dtype, 4)
    found = reader.load("epoch=001")
    assert set(found) == {LAST, PROMPTS}
    assert_close(found[LAST].rows, states(2)[LAST].rows.to(getattr(torch, dtype)), rtol=0, atol=0)
    assert [reader.pair_ids[i] for i in found[LAST].pair_index] == ["hh/a", "hh/a", "hh/b", "hh/b"]
    assert found[LAST].sides.tolist() == [CHOSEN, REJECTED] * 2


def test_two_stored_readings_are_a_pair_like_those_read_live(tmp_path: Path) -> None:
    out = writer(tmp_path)
    for i, name in enumerate([BASE, epoch_name(0)]):
        out.write(name, states(i))
    tokens = TokenizedPair([1], [2], [3])
    pair = SnapshotReader(tmp_path).pair("epoch=000", {"hh/a": ("prompt", tokens)})
    live = StatePair(states(0), states(1), [IDS.get(i, "") for i in range(43)])
    assert (pair.name, pair.dtype, pair.steps_taken) == ("epoch=000", "float32", None)
    assert set(pair.points) == {PROMPTS, LAST}
    for point in pair.points:
        assert_close(pair.update(point), live.update(point), rtol=0, atol=0)
        assert pair.ids_of(point) == live.ids_of(point)
    assert pair.clusters_of(PROMPTS) == ["prompt", "hh/b"], "a pair of unknown prompt stands for its own"
    assert pair.tokens == (), "of one pair they are not known"


def test_the_manifest_can_be_read_by_people(tmp_path: Path) -> None:
    writer(tmp_path).write(BASE, states())
    content = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert content["sites"] == ["layer_01"]
    assert content["labels"]["prompt_last"] == {
        "pair_ids": ["hh/a", "hh/b"],
        "sides": ["prompt", "prompt"],
        "n_rows": 2,
    }
    assert set(content["files"]) == {"base.safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "manifest.json"]


def test_a_probe_of_a_model_goes_to_disk_and_back(tmp_path: Path) -> None:
    batch = collate_pairs(random_pairs(3), pair_index=[40, 41, 42])
    found = read_hidden_states(make_model("gpt2"), batch, sites="all", positions=["prompt_last", "response_mean"])
    writer(tmp_path).write(BASE, found)
    loaded = SnapshotReader(tmp_path).load(BASE)
    assert set(loaded) == set(found)
    for point, snapshot in loaded.items():
        assert_close(snapshot.rows, found[point].rows, rtol=0, atol=0)
    assert SnapshotReader(tmp_path).pair_ids == ["hh/a", "hh/b", "hh/c"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_a_full_disk_leaves_what_was_there_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    out = writer(tmp_path)
    out.write(BASE, states())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half of it")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("tiltmeter.states.snapshots.save_file", full)
        for name in (BASE, epoch_name(0)):
            with pytest.raises(OSError, match=r"No space left|I/O error"):
                out.write(name, states(1))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    out.write(epoch_name(1), states(2))
    assert SnapshotReader(tmp_path).names == ["base", "epoch=001"]


def test_a_full_disk_at_the_manifest_leaves_an_observation_that_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = writer(tmp_path)
    out.write(BASE, states())

    def full(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tiltmeter.states.snapshots.write_json", full)
        with pytest.raises(OSError, match="No space left"):
            out.write(epoch_name(0), states(1))
    reader = SnapshotReader(tmp_path)
    assert reader.names == ["base"]
    with pytest.raises(UserError, match=r"epoch=000\.safetensors: not in manifest\.json, which lists base"):
        reader.load("epoch=000")


def test_a_folder_is_continued_after_a_resume(tmp_path: Path) -> None:
    writer(tmp_path).write(BASE, states())
    writer(tmp_path, about={"model": "forgotten"}).write(epoch_name(0), states(1))
    reader = SnapshotReader(tmp_path)
    assert reader.names == ["base", "epoch=000"]
    assert reader.manifest.about == {"model": "tiny"}
    writer(tmp_path).write(epoch_name(0), states(5))
    found = SnapshotReader(tmp_path).load(epoch_name(0))
    assert_close(found[LAST].rows, states(5)[LAST].rows, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "other", "what"),
    [
        ({"dtype": "bfloat16"}, states(), "other dtype, got bfloat16 where it has float32"),
        ({}, states(d=5), "other d_model, got 5 where it has 4"),
        ({}, {LAST: states()[LAST]}, "other labels"),
        ({}, {p._replace(site="layer_02"): x for p, x in states().items()}, "other sites"),
        ({"pair_ids": IDS | {40: "hh/z"}}, states(), "other labels"),
    ],
)
def test_rows_that_would_not_match_are_refused(tmp_path: Path, options: Any, other: Any, what: str) -> None:
    writer(tmp_path).write(BASE, states())
    with pytest.raises(UserError, match=what):
        writer(tmp_path, **options).write(epoch_name(0), other)
    assert not (tmp_path / "epoch=000.safetensors").exists()


def corrupt(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt, r"base\.safetensors: damaged \(its sha256"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), r"base\.safetensors: damaged"),
        (lambda path: path.unlink(), r"base\.safetensors: listed in manifest\.json but missing"),
    ],
)
def test_a_damaged_file_is_named_and_refused(tmp_path: Path, damage: Any, message: str) -> None:
    writer(tmp_path).write(BASE, states())
    damage(tmp_path / "base.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        SnapshotReader(tmp_path).load(BASE)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 1, "labels": {}}', "damaged"),
        (
            '{"format": 1, "labels": {"diverge": {"pair_ids": ["a"], "sides": ["left"]}}}',
            "damaged .no side is called left",
        ),
        ('{"format": 9}', r"format 9 is not known \(expected 1\)"),
    ],
)
def test_a_damaged_manifest_is_named_and_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    for open_folder in (SnapshotReader, writer):
        with pytest.raises(UserError, match=rf"manifest\.json: {message}"):
            open_folder(tmp_path)


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):
        SnapshotReader(tmp_path)
    with pytest.raises(UserError, match="dtype: expected one of bfloat16, float32, got float16"):
        writer(tmp_path, dtype="float16")
    for name in ("../escape", "a/b", "", ".hidden"):
        with pytest.raises(UserError, match="expected a plain file name"):
            writer(tmp_path).write(name, states())
    elsewhere = LAST._replace(site="layer_02")
    with pytest.raises(ValueError, match="every position at every site"):
        writer(tmp_path).write(BASE, {elsewhere: states()[LAST], PROMPTS: states()[PROMPTS]})
    with pytest.raises(ValueError, match="rows at response_last are of other pairs at layer_02"):
        writer(tmp_path).write(BASE, {**states(), elsewhere: states()[PROMPTS]})
    assert list(tmp_path.iterdir()) == []
