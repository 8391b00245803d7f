"""A model made without weights that then reads them is, bit for bit, the model that was loaded whole."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny_models import make_model, make_tokenizer
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import CausalLM
from tiltmeter.models.lora import add_lora, check_adapters, insert_adapters, plain_state
from tiltmeter.models.sharded_weights import EmptyModel

CPU = torch.device("cpu")
VOCAB = 300  # more than the tokenizer has


def stored(folder: Path, family: str = "llama", **changes: object) -> CausalLM:
    """A small model on disk, in several files."""
    make_model(family, **({"vocab_size": VOCAB} | changes)).save_pretrained(folder, max_shard_size="50KB")
    return CausalLM(str(folder))


def everything(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and all buffers, also those that are never saved."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def empty_of(spec: CausalLM) -> EmptyModel:
    empty = spec.build_empty(make_tokenizer())
    assert empty is not None
    return empty


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("gpt2", {}),
        ("gemma3_text", {}),
        ("gpt_neox", {}),
    ],
)
def test_reading_weights_afterwards_gives_the_model_that_is_loaded_whole(
    family: str, changes: dict[str, object], tmp_path: Path
) -> None:
    spec = stored(tmp_path, family, **changes)
    whole, empty = spec.build(make_tokenizer()), empty_of(spec)
    assert all(parameter.is_meta for parameter in empty.model.parameters()), "nothing is read yet"
    before = torch.get_rng_state()
    empty.read_weights(CPU)
    assert torch.equal(torch.get_rng_state(), before)
    ours, theirs = everything(empty.model), everything(whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert empty.model.config.to_dict() == whole.config.to_dict()
    assert empty.model.generation_config.to_dict() == whole.generation_config.to_dict()
    assert not empty.model.training
    head, embedding = empty.model.get_output_embeddings().weight, empty.model.get_input_embeddings().weight
    assert (head is embedding) == (whole.get_output_embeddings().weight is whole.get_input_embeddings().weight)


def test_files_of_the_backbone_alone_are_read_by_its_prefix_and_other_dtypes_converted(tmp_path: Path) -> None:
    spec = stored(tmp_path / "tied", tie_word_embeddings=True)
    state: dict[str, Tensor] = {}
    for file in sorted((tmp_path / "tied").glob("model*.safetensors")):
        state |= load_file(file)
        file.unlink()
    (tmp_path / "tied" / "model.safetensors.index.json").unlink()
    half = {name.removeprefix("model."): tensor.half() for name, tensor in state.items()}
    save_file(half, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    empty, whole = empty_of(spec), spec.build(make_tokenizer())
    empty.read_weights(CPU)
    for name, tensor in everything(empty.model).items():
        assert torch.equal(tensor, everything(whole)[name]), name
    assert empty.model.dtype == torch.float32


def test_adapters_put_in_before_the_weights_are_those_put_in_after(tmp_path: Path) -> None:
    spec = stored(tmp_path)
    whole, empty = spec.build(make_tokenizer()), empty_of(spec)
    torch.manual_seed(3)
    add_lora(whole, LoraConfig(r=2))
    torch.manual_seed(3)
    insert_adapters(empty.model, LoraConfig(r=2))
    empty.read_weights(CPU)
    check_adapters(empty.model)
    ours, theirs = everything(empty.model), everything(whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
        assert ours[name].requires_grad == theirs[name].requires_grad, name
    plain = spec.build(make_tokenizer()).state_dict()
    adapted = plain_state(empty.model)
    assert adapted.keys() == plain.keys()
    assert all(torch.equal(adapted[name], plain[name]) for name in plain)


def test_models_from_scratch_and_weights_in_another_form_are_left_to_be_made_whole(tmp_path: Path) -> None:
    scratch = CausalLM(init="random", architecture={"model_type": "llama"})
    assert scratch.build_empty(make_tokenizer()) is None
    spec = stored(tmp_path)
    config = tmp_path / "config.json"
    as_saved = config.read_text(encoding="utf-8")
    quantized = json.loads(as_saved) | {"quantization_config": {"quant_method": "fp8"}}
    config.write_text(json.dumps(quantized), encoding="utf-8")
    assert spec.build_empty(make_tokenizer()) is None
    config.write_text(as_saved, encoding="utf-8")
    assert spec.build_empty(make_tokenizer()) is not None
    index = tmp_path / "model.safetensors.index.json"
    first = tmp_path / json.loads(index.read_text())["weight_map"]["model.norm.weight"]
    renamed = {name.replace("model.norm", "model.other"): tensor for name, tensor in load_file(first).items()}
    save_file(renamed, first, metadata={"format": "pt"})
    assert spec.build_empty(make_tokenizer()) is None


def test_damaged_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    spec = stored(tmp_path)
    empty = empty_of(spec)
    file = max(tmp_path.glob("model*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=re.escape(f"name_or_path: cannot load {tmp_path}")):
        spec.build_empty(make_tokenizer())
    with pytest.raises(UserError, match=r"name_or_path: cannot read weights"):
        empty.read_weights(CPU)
