"""Exported vectors are read back by the tools that they are for, or as these tools read them, and steer as they do here."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_models import WIDTH, make_model, make_tokenizer
from tiltmeter.errors import UserError
from tiltmeter.models.layers import FINAL_POST_NORM, layer_site
from tiltmeter.steering.export import (
    export,
    main,
    vectors_by_block,
    write_control_vector,
    write_lm_eval,
    write_steering_vectors,
)
from tiltmeter.steering.intervene import Intervention, steer
from tiltmeter.steering.vector import V_BAR, V_STAR, SteeringVector, VectorId, save_vectors

DEPTH = 3
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def vector(site: str, seed: int = 0, kind: str = V_STAR) -> SteeringVector:
    values = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(VectorId(kind, site, "prompt_last"), values, made="by hand")


VECTORS = [vector(layer_site(block), block) for block in range(DEPTH)]


@torch.no_grad()
def steered_here(model: Any, blocks: list[int]) -> Tensor:
    with steer(model, [Intervention(layer_site(i), VECTORS[i].values[None], 1.0, tokens="all") for i in blocks]):
        logits: Tensor = model(IDS).logits
    return logits


@torch.no_grad()
def test_the_steering_vectors_package_steers_as_here(tmp_path: Path) -> None:
    peer = pytest.importorskip("steering_vectors", reason="`make test` puts it into .venv/peers")
    write_steering_vectors(tmp_path / "v.safetensors", [*VECTORS, vector(FINAL_POST_NORM)])
    tensors = load_file(tmp_path / "v.safetensors")
    model = make_model("llama", num_hidden_layers=DEPTH).eval()
    theirs = peer.SteeringVector({int(name.removeprefix("layer_")): v for name, v in tensors.items()})
    with theirs.apply(model, multiplier=1.0):
        logits = model(IDS).logits
    torch.testing.assert_close(logits, steered_here(model, [0, 1, 2]), rtol=1e-5, atol=1e-5)


def test_a_control_vector_has_repeng_s_names_and_no_direction_behind_block_0(tmp_path: Path) -> None:
    assert write_control_vector(tmp_path / "v.gguf", VECTORS, model_type="llama") == [1, 2]
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    assert {t.name: torch.tensor(t.data).tolist() for t in reader.tensors} == {
        f"direction.{i}": VECTORS[i].values.tolist() for i in (1, 2)
    }


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lm_evaluation_harness_finds_the_module_and_adds_what_is_added_here(tmp_path: Path, family: str) -> None:
    """As its ``steered`` model does: hooks by the names of ``base_model.named_modules()``, acts + coefficient × vector."""
    model = make_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": DEPTH}).eval()
    written = write_lm_eval(tmp_path, VECTORS, model)
    assert [path.name for path in written] == ["layer_00.pt", "layer_01.pt", "layer_02.pt"], "it adds one vector a file"
    ((hookpoint, entry),) = torch.load(written[1], weights_only=True).items()
    module = dict(model.base_model.named_modules())[hookpoint]

    def add(_: Any, __: Any, output: Any) -> Any:
        shift = entry["steering_coefficient"] * entry["steering_vector"]
        return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

    handle = module.register_forward_hook(add)
    logits = model(IDS).logits
    handle.remove()
    assert (entry["action"], entry["bias"]) == ("add", None)
    torch.testing.assert_close(logits, steered_here(model, [1]), rtol=1e-5, atol=1e-5)


def test_vectors_that_share_a_block_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"layer_01 has two, v\* at prompt_last and v_bar at prompt_last; choose by kind"
    ):
        vectors_by_block([vector("layer_01"), vector("layer_01", kind=V_BAR)])


def test_the_command_takes_the_model_from_the_run_and_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out.gguf"
    make_model("llama", num_hidden_layers=DEPTH).save_pretrained(run / "base")
    make_tokenizer().save_pretrained(run / "base")
    held = {"a": VECTORS[1], "b": vector("layer_01", kind=V_BAR), "c": vector(FINAL_POST_NORM)}
    save_vectors(run / "vectors" / "v.safetensors", held)
    assert main([str(run / "vectors" / "v.safetensors"), str(out), "format=gguf", "kind=v*"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Wrote 1 vectors, behind blocks 1: {out}", "Left out, as gguf knows no such place: final_post_norm",
    ]  # fmt: skip
    export(run / "vectors" / "v.safetensors", tmp_path / "lm", "lm_eval", {"kind": "v*"}, None)
    assert [path.name for path in (tmp_path / "lm").iterdir()] == ["layer_01.pt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["FILE"], "expected FILE OUT format="),
        (["FILE", "out", "format=repeng"], "format: expected steering_vectors, gguf, lm_eval, got repeng"),
        (["FILE", "out", "kind=probe"], "no vector with {'kind': 'probe'}; it has kind=v* position=prompt_last"),
        (["FILE", "out", "knd=probe"], "expected FILE OUT"),
        (["missing", "out"], "missing: no such file"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    save_vectors(tmp_path / "v", {"a": VECTORS[1]})
    assert main([text.replace("FILE", str(tmp_path / "v")) for text in arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
