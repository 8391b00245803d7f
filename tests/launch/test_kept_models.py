"""A run's models are its own: nobody writes to them from outside, and what was changed all the same isn't opened."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from analysis.open.adapters import WEIGHTS, check_adapter
from analysis.open.kept_models import MADE_FROM, PROVENANCE, check_made, read_provenance, record_kept
from analysis.open.models import load_model
from analysis.open.stored_head import unembedding_rows
from launch.run_folder import keep_base, kept_base
from tests.analysis.asked import TOKENIZER, save_model
from tests.analysis.open.test_adapters import write_adapter
from tests.processes import contents
from tiltmeter.errors import UserError
from tiltmeter.files import copy_file, sha256_of, write_json
from tiltmeter.models.causal_lm import CausalLM

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
OPENERS: dict[str, Callable[[Path], object]] = {
    "base": lambda run: kept_base(run, CausalLM("anywhere")),
    "aligned": lambda run: load_model(run / "aligned"),
    "adapter": lambda run: check_adapter(run / "adapter", base=str(run.parent / "given")),
}


@pytest.fixture
def given(tmp_path: Path) -> Path:
    return save_model(tmp_path / "given", seed=0)


@pytest.fixture
def run(given: Path, tmp_path: Path) -> Path:
    """A run's folder with the models that it keeps."""
    folder = tmp_path / "run"
    keep_base(folder, CausalLM(str(given)), TOKENIZER, None)
    write_adapter(folder / "adapter", given)
    save_model(folder / "aligned", seed=1)
    for name in ("adapter", "aligned"):
        record_kept(folder, folder / name, name)
    return folder


def damage(path: Path) -> None:
    """One byte of the last weight, written in place."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def test_the_base_is_a_copy_that_a_write_to_the_given_model_leaves_alone(given: Path, run: Path) -> None:
    before, inodes = contents(run), {path.stat().st_ino for path in given.iterdir()}
    damage(given / "model.safetensors")
    assert contents(run) == before
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {path.stat().st_nlink for path in files} == {1}
    assert not inodes & {path.stat().st_ino for path in files}


def test_a_copy_is_whole_also_where_the_system_copies_nothing_or_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(5000))
    for said in (lambda *_: 0, lambda reader, writer, n: os.write(writer, os.read(reader, 700)) and 0):
        monkeypatch.setattr(os, "copy_file_range", said, raising=False)
        copy_file(source, target)
        assert target.read_bytes() == source.read_bytes()
    monkeypatch.delattr(os, "copy_file_range")
    copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()


def test_provenance_holds_the_sha256_of_every_file_of_the_models(run: Path) -> None:
    expected = {name: digest for name, digest in contents(run).items() if name != PROVENANCE}
    assert read_provenance(run)["files_sha256"] == expected
    assert {"base/model.safetensors", "aligned/model.safetensors", f"adapter/{WEIGHTS}"} < expected.keys()


@pytest.mark.parametrize("name", OPENERS)
@pytest.mark.parametrize("fault", ["changed", "gone"])
def test_a_model_whose_file_is_another_one_is_refused_by_it(name: str, fault: str, run: Path) -> None:
    OPENERS[name](run)
    path = run / name / (WEIGHTS if name == "adapter" else "model.safetensors")
    expected = sha256_of(path)[:12]
    if fault == "changed":
        damage(path)
    else:
        path.unlink()
    with pytest.raises(UserError) as refused:
        OPENERS[name](run)
    assert f"{path}: {'changed since it was written' if fault == 'changed' else 'no such file'}" in str(refused.value)
    assert f"{expected}…" in str(refused.value)
    assert "restore it from a copy" in str(refused.value)
    for other in OPENERS.keys() - {name}:
        OPENERS[other](run)


def test_an_unembedding_of_other_weights_is_not_read(run: Path) -> None:
    rows = unembedding_rows(run / "base", [3, 4])
    assert rows is not None
    weights = load_file(run / "base" / "model.safetensors")
    assert torch.equal(rows, weights.get("lm_head.weight", weights["model.embed_tokens.weight"])[[3, 4]])
    damage(run / "base" / "model.safetensors")
    with pytest.raises(UserError, match="changed since it was written"):
        unembedding_rows(run / "base", [3, 4])


def test_a_cached_base_that_was_changed_is_refused_and_says_how_to_have_it_again(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bases" / "1234", seed=0)
    check_made(folder)  # an earlier version kept no hashes
    write_json(
        folder / MADE_FROM, {"files_sha256": {"1234/model.safetensors": sha256_of(folder / "model.safetensors")}}
    )
    check_made(folder)
    damage(folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"changed since .*remove {folder} to have it made again"):
        check_made(folder)


def test_a_base_on_the_hub_is_kept_at_its_commit(tmp_path: Path) -> None:
    keep_base(tmp_path, CausalLM("someone/model"), TOKENIZER, "abc")
    kept = kept_base(tmp_path, CausalLM("someone/model", dtype="bfloat16"))
    assert kept == CausalLM("someone/model", revision="abc", dtype="bfloat16")


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"files_sha256": "x"})])
def test_a_damaged_provenance_is_named(text: str, run: Path) -> None:
    (run / PROVENANCE).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"{run / PROVENANCE}: damaged"):
        load_model(run / "aligned")
