import errno
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from callbacks.directional_consistency import DirectionalConsistency
from callbacks.probe_session import ProbeSession
from tests.tiny_models import LAYERS, WIDTH, make_model, random_pairs
from tiltmeter.errors import UserError
from tiltmeter.geometry.directions import steering_vector
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.states.capture import read_hidden_states
from tiltmeter.states.state_pair import StatePair
from tiltmeter.steering.vector import OWN, V_STAR, SteeringVector, VectorId, load_vectors, save_vectors


def vector(values: Any = (1.0, 2.0, 2.0), **changes: Any) -> SteeringVector:
    where = {"kind": V_STAR, "site": "layer_07", "position": "prompt_last"}
    where |= {key: changes.pop(key) for key in VectorId._fields if key in changes}
    about: dict[str, Any] = {"made": "by hand", "provenance": {"data": "hh", "n_pairs": 64, "share": 0.5}} | changes
    return SteeringVector(VectorId(**where), torch.as_tensor(values, dtype=torch.float32), **about)  # type: ignore[arg-type]


def test_norm_cosine_and_multiples_are_those_of_the_textbook() -> None:
    v = vector([3.0, 0.0, 4.0])
    assert v.norm() == 5
    assert v.d_model == 3
    assert v.cosine(vector([0.0, 7.0, 0.0])) == 0
    assert v.cosine(v.scaled(-2)) == pytest.approx(-1)
    assert v.scaled(-2).id == v.id
    assert math.isnan(v.cosine(v.scaled(0)))
    assert vector([3e30, 0.0, 4e30]).norm() == pytest.approx(5e30), "no overflow of the squares"
    with pytest.raises(UserError, match="expected finite values"):
        vector([1e30, 0.0, 0.0]).scaled(1e30)


def test_vectors_of_different_spaces_are_not_compared() -> None:
    for other in (vector(site="layer_06"), vector([1.0, 2.0])):
        with pytest.raises(UserError, match="live in different spaces"):
            vector().cosine(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": "layer_7"}, "sites: expected final_pre_norm, .* got 'layer_7'"),
        ({"position": "somewhere"}, "positions: expected one of"),
        ({"values": torch.zeros(2, 3)}, r"layer_07: expected one row of float32, got torch.float32 of shape \(2, 3\)"),
        ({"values": torch.zeros(3).double()}, r"expected one row of float32, got torch.float64"),
        ({"values": torch.zeros(3).bfloat16()}, "expected one row of float32, got torch.bfloat16"),
        ({"values": torch.zeros(0)}, r"expected one row of float32, got torch.float32 of shape \(0,\)"),
        ({"values": torch.tensor([1.0, math.inf])}, "expected finite values"),
        ({"provenance": {"models": ["a", "b"]}}, "expected strings and numbers, got something else at 'models'"),
        ({"provenance": {"p": math.nan}}, "expected strings and numbers, got something else at 'p'"),
    ],
)
def test_what_is_no_steering_vector_is_refused(changes: dict[str, Any], message: str) -> None:
    place = VectorId(OWN, changes.pop("site", "layer_07"), changes.pop("position", None))
    about: dict[str, Any] = {"values": torch.zeros(3), "made": "by hand"}
    with pytest.raises(UserError, match=message) as caught:
        SteeringVector(place, **(about | changes))
    assert "\n" not in str(caught.value)


def test_a_vector_knows_which_models_it_fits() -> None:
    model = make_model("gpt2")
    vector(torch.ones(WIDTH), site="final_post_norm").check_fits(model)
    with pytest.raises(UserError, match=rf"layer_00: expected width {WIDTH}, .* got 3; use a vector"):
        vector(site="layer_00").check_fits(model)
    with pytest.raises(UserError, match=rf"layer_07: this model has {LAYERS} blocks"):
        vector(torch.ones(WIDTH)).check_fits(model)


def test_a_file_gives_back_what_went_in(tmp_path: Path) -> None:
    path = tmp_path / "new" / "vectors.safetensors"
    wrote = {
        "v_star/layer_07": vector([1e-7, -0.0, 3.0]),
        "size": vector(kind="singular_raw", draw=2, source="sft_chosen"),
        "größe": vector(site="final_post_norm", position=None, provenance={"was": "√λ"}),
        "row of a table": vector(torch.arange(6.0).reshape(2, 3)[1]),
    }
    save_vectors(path, wrote)
    found = load_vectors(path)
    assert set(found) == set(wrote)
    for name, v in found.items():
        assert torch.equal(v.values, wrote[name].values)
        about = [(x.id, x.made, dict(x.provenance)) for x in (v, wrote[name])]
        assert about[0] == about[1]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_run_file_of_the_first_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "steering.safetensors"
    metadata = {"what": "v*, mean of h_policy - h_base over the probe's pairs", "n_rows": "64", "steps_taken": "120"}
    save_file({"layer_00": torch.ones(3), "diverge/layer_00": torch.zeros(3)}, path, metadata=metadata)
    found = load_vectors(path)
    assert {name: v.id for name, v in found.items()} == {
        "layer_00": VectorId(V_STAR, "layer_00", "prompt_last"),
        "diverge/layer_00": VectorId(V_STAR, "layer_00", "diverge"),
    }
    v = found["layer_00"]
    assert v.made == metadata["what"]
    assert v.provenance == {"n_rows": "64", "steps_taken": "120"}


def test_sweep_file_without_kinds_is_read(tmp_path: Path) -> None:
    known = {"site": "layer_00", "position": None, "made": "by hand", "provenance": {}}
    path = tmp_path / "steering_sweep.safetensors"
    save_file({"layer_00/v*": torch.ones(3)}, path, metadata={"steering_vectors": json.dumps({"layer_00/v*": known})})
    assert load_vectors(path)["layer_00/v*"].id == VectorId(OWN, "layer_00"), "nothing is read out of its name"


def test_the_file_of_the_callback_itself_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate_pairs(random_pairs(4), pair_index=range(4))
    base, policy = (
        read_hidden_states(make_model("gpt2", seed=seed), batch, sites="all", positions=["prompt_last", "diverge"])
        for seed in (0, 1)
    )
    monkeypatch.setattr("callbacks.directional_consistency.log", lambda trainer, metrics: None)
    callback = DirectionalConsistency(positions=["prompt_last", "diverge"])
    trainer: Any = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path)
    monkeypatch.setattr(ProbeSession, "of", lambda _: ProbeSession())
    monkeypatch.setattr(callback, "points", lambda module, seen: seen.points)
    callback.on_observation(trainer, trainer, StatePair(base, policy, steps_taken=7))
    found = load_vectors(tmp_path / "vectors" / "steering.safetensors")
    by_place = {(v.site, v.id.position): v for v in found.values()}
    assert set(by_place) == set(base)
    for point, v in by_place.items():
        assert_close(v.values, steering_vector(base[point].rows, policy[point].rows).float())
        v.check_fits(make_model("gpt2"))
    assert {v.id.kind for v in found.values()} == {V_STAR}
    assert by_place["layer_00", "diverge"].provenance["steps_taken"] == "7"


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"layer_00": torch.ones(3)}, {}, "expected steering vectors and how they were made, found something else"),
        ({"lm_head.weight": torch.ones(3, 3)}, {"format": "pt"}, "expected steering vectors"),
        ({"nowhere/layer_00": torch.ones(3)}, {"what": "v*"}, "positions: expected one of"),
        ({"layer_00": torch.ones(3, 3)}, {"what": "v*"}, "layer_00: expected one row of float32"),
        ({"layer_00": torch.full((3,), math.nan)}, {"what": "v*"}, "layer_00: expected finite values"),
        ({"a": torch.ones(3)}, {"steering_vectors": "{"}, "expected steering vectors"),
        ({"a": torch.ones(3)}, {"steering_vectors": "[]"}, "expected steering vectors"),
        ({"a": torch.ones(3)}, {"steering_vectors": '{"b": {}}'}, "expected steering vectors"),
        (
            {"a": torch.ones(3)},
            {"steering_vectors": '{"a": {"site": "layer_00", "x": 1}}'},
            "expected steering vectors",
        ),
        ({"a": torch.ones(3)}, {"steering_vectors": '{"a": {"site": "top", "made": ""}}'}, "sites: expected"),
    ],
)
def test_a_file_of_something_else_is_named_and_refused(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], message: str
) -> None:
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match=message) as caught:
        load_vectors(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    with pytest.raises(UserError, match=r"vectors\.safetensors: no such file"):
        load_vectors(path)
    save_vectors(path, {"a": vector()})
    for damage in (b"", path.read_bytes()[:40], path.read_bytes()[:-2], b"{" * 100):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"vectors\.safetensors: damaged or no safetensors file"):
            load_vectors(path)
    with pytest.raises(UserError, match="damaged or no safetensors file"):
        load_vectors(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_a_full_disk_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "vectors.safetensors"
    save_vectors(path, {"a": vector()})
    before = path.read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr("tiltmeter.steering.vector.save_file", full)
    with pytest.raises(OSError, match=r"No space left|I/O error"):
        save_vectors(path, {"b": vector()})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {path.name: before}
