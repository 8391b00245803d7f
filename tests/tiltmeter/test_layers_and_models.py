import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, GPT2Config, PreTrainedTokenizerFast

from lightning_modules.policy import freeze_embeddings
from tests.tiny_models import ARCHITECTURES, FAMILIES, LAYERS, VOCAB, WIDTH, make_model, make_tokenizer
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import CausalLM, choose_attention, without_dropout
from tiltmeter.models.layers import (
    Unembedding,
    backbone,
    decoder_blocks,
    embedding_parameters,
    sliding_window,
    unembedding,
)

ALL = tuple(ARCHITECTURES)
LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "intermediate_size": 16
}


def apply_head(head: Unembedding, hidden: torch.Tensor) -> torch.Tensor:
    logits = head.scale * torch.nn.functional.linear(hidden, head.weight, head.bias)
    return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)


@pytest.mark.parametrize("family", ALL)
def test_backbone_and_unembedding_give_the_logits_of_the_whole_model(family: str) -> None:
    model = make_model(family, torch.float32, "eager")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        hidden = backbone(model)(input_ids=ids).last_hidden_state
        assert_close(apply_head(unembedding(model), hidden), model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ALL)
def test_decoder_blocks_are_in_the_order_they_run(family: str) -> None:
    model = make_model(family, attn="eager")
    ran: list[int] = []
    blocks = decoder_blocks(model)
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    backbone(model)(input_ids=torch.tensor([[1, 2]]))
    assert ran == list(range(LAYERS)) == list(range(len(blocks)))


@pytest.mark.parametrize("family", ALL)
def test_freezing_leaves_exactly_the_blocks_and_the_last_norm_trainable(family: str) -> None:
    model = make_model(family, attn="eager")
    frozen = freeze_embeddings(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    inside = {name for name, _ in model.named_parameters() if re.search(r"\.(layers|h)\.\d+\.", name)}
    final_norm = {name for name in trainable - inside if re.search(r"(ln_f|norm|layer_?norm)\.(weight|bias)$", name)}
    assert final_norm
    assert trainable == inside | final_norm
    assert frozen == sum(p.numel() for p in embedding_parameters(model))
    tied = model.config.tie_word_embeddings
    positions = 256 * WIDTH if family == "gpt2" else 0
    head_bias = VOCAB if family == "phi" else 0
    assert frozen == VOCAB * WIDTH * (1 if tied else 2) + positions + head_bias


def test_a_model_without_the_expected_parts_is_refused() -> None:
    model = make_model("llama")
    model.lm_head = torch.nn.Identity()
    with pytest.raises(UserError, match="expected a linear unembedding"):
        unembedding(model)
    model.config.num_hidden_layers = 5
    with pytest.raises(UserError, match="expected a list of 5 decoder blocks"):
        decoder_blocks(model)
    with pytest.raises(UserError, match="with a backbone"):
        backbone(make_model("llama").model)


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("gpt2", {}, None),
        ("mistral", {}, None),
        ("mistral", {"sliding_window": 9}, 9),
        ("gemma2", {"sliding_window": 9}, 9),
        ("qwen2", {"sliding_window": 9, "use_sliding_window": False}, None),
        ("gemma2", {"sliding_window": 9, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_sliding_window_is_the_one_that_some_layer_uses(
    family: str, changes: dict[str, Any], window: int | None
) -> None:
    assert sliding_window(make_model(family, attn="eager", **changes)) == window


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"name_or_path: expected a hub id or a folder"),
        ({"init": "zeros", "name_or_path": "x"}, r"init: expected pretrained or random, got zeros"),
        ({"name_or_path": "x", "architecture": LLAMA}, r"architecture: only for init=random"),
        ({"init": "random", "name_or_path": "x", "architecture": LLAMA}, r"name_or_path: not with"),
        ({"init": "random"}, "needs model_type"),
        ({"init": "random", "architecture": {"hidden_size": 8}}, "needs model_type"),
        ({"name_or_path": "x", "dtype": "float16"}, r"dtype: expected one of float32, bfloat16, float64"),
        ({"name_or_path": "x", "attn_implementation": "flash"}, r"attn_implementation: expected sdpa or eager"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        CausalLM(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_takes_vocabulary_and_special_ids_from_the_tokenizer(family: str) -> None:
    tokenizer = make_tokenizer()
    sizes = {k: v for k, v in ARCHITECTURES[family].items() if not k.endswith("token_id") and k != "vocab_size"}
    spec = CausalLM(init="random", architecture={"model_type": family} | sizes, attn_implementation="eager")
    assert spec.trains_tokenizer
    model = spec.build(tokenizer)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    assert model.dtype == torch.float32
    assert model.config.use_cache is True, "a model that is exported must generate with a cache"


def test_dropout_is_off_in_configuration_and_in_effect() -> None:
    config = without_dropout(GPT2Config(resid_pdrop=0.3, embd_pdrop=0.2, attn_pdrop=0.1, summary_first_dropout=0.4))
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == config.summary_first_dropout == 0.0
    architecture = {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "resid_pdrop": 0.5,
        "embd_pdrop": 0.5,
    }
    model = CausalLM(init="random", architecture=architecture).build(make_tokenizer()).train()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pretrained model whose tokenizer has no padding token."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = make_tokenizer()
    CausalLM(init="random", architecture=LLAMA).build(tokenizer).save_pretrained(folder)
    inner = tokenizer.backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_saved_model_loads_in_the_dtype_asked_for(saved: Path, dtype: str) -> None:
    spec = CausalLM(name_or_path=str(saved), dtype=dtype)
    model = spec.build(spec.load_tokenizer())
    assert str(model.dtype) == f"torch.{dtype}"
    assert not spec.trains_tokenizer


def test_a_tokenizer_without_padding_token_pads_with_eos(saved: Path) -> None:
    tokenizer = CausalLM(name_or_path=str(saved)).load_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def refused(spec: CausalLM) -> str:
    with pytest.raises(UserError) as caught:
        spec.build(spec.load_tokenizer())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_hub_id_without_network_is_one_clear_line() -> None:
    message = refused(CausalLM(name_or_path="nobody/nothing-of-this-name"))
    assert message.startswith("name_or_path: cannot load nobody/nothing-of-this-name from the Hugging Face hub")
    with pytest.raises(UserError, match=r"name_or_path: cannot load nobody/nothing-of-this-name from"):
        CausalLM(name_or_path="nobody/nothing-of-this-name").build(make_tokenizer())


def test_a_gated_model_is_one_line_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: object, **__: object) -> None:
        raise OSError(
            "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/x/y."
        )

    monkeypatch.setattr("tiltmeter.models.causal_lm.AutoConfig.from_pretrained", gated)
    with pytest.raises(
        UserError, match=r"cannot load x/y from .* \(You are trying to access a gated repo\.\); .*hf auth login"
    ) as told:
        CausalLM(name_or_path="x/y").load_config()
    assert "\n" not in str(told.value)


def test_a_folder_that_does_not_exist_is_named() -> None:
    assert "no such folder: ./not/here" in refused(CausalLM(name_or_path="./not/here"))


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refused(CausalLM(name_or_path=str(folder))).startswith(f"name_or_path: cannot load {folder}")


def test_weights_in_pickle_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, folder / "pytorch_model.bin")
    message = refused(CausalLM(name_or_path=str(folder)))
    assert message.startswith(f"name_or_path: cannot load {folder}")
    assert "safetensors" in message


def test_weights_that_were_cut_off_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert refused(CausalLM(name_or_path=str(folder))).startswith(f"name_or_path: cannot load {folder}")


def test_a_broken_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert str(folder) in refused(CausalLM(name_or_path=str(folder)))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(saved: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(5)])
    with pytest.raises(UserError, match="has 285 tokens, but the model's vocabulary 280"):
        CausalLM(name_or_path=str(saved)).build(tokenizer)


@pytest.mark.parametrize("change", [{"model_type": "lama"}, {"num_attention_heads": 3}, {"hidden_size": "wide"}])
def test_an_architecture_that_cannot_be_built_is_refused_in_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"architecture: ") as caught:
        CausalLM(init="random", architecture=LLAMA | change).build(make_tokenizer())
    assert "\n" not in str(caught.value)


def test_loading_a_tokenizer_that_is_to_be_trained_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="trained on the data"):
        CausalLM(init="random", architecture=LLAMA).load_tokenizer()


@pytest.mark.parametrize(
    ("family", "kernel"), [("llama", "sdpa"), ("gemma2", "eager"), ("bloom", "eager"), ("gptj", "eager")]
)
def test_a_family_without_scaled_dot_product_attention_gets_eager_by_itself(family: str, kernel: str) -> None:
    config = AutoConfig.for_model(family)
    assert choose_attention(config) == kernel
    assert choose_attention(config, "eager") == "eager"


def test_a_model_is_built_on_the_kernel_that_its_family_has() -> None:
    sizes = {k: v for k, v in ARCHITECTURES["gemma2"].items() if not k.endswith("token_id") and k != "vocab_size"}
    architecture = {"model_type": "gemma2"} | sizes
    assert (
        CausalLM(init="random", architecture=architecture).build(make_tokenizer()).config._attn_implementation
        == "eager"
    )
    with pytest.raises(
        UserError, match=r"^attn_implementation=sdpa: gemma2 has no such kernel; leave it out or set it"
    ):
        CausalLM(init="random", architecture=architecture, attn_implementation="sdpa").load_config()


def test_dropout_of_any_name_is_off_in_configurations_inside_as_well() -> None:
    config = AutoConfig.for_model("opt")
    config.inside = GPT2Config(resid_pdrop=0.3)
    assert without_dropout(config).inside.resid_pdrop == 0.0
    assert without_dropout(AutoConfig.for_model("opt", layerdrop=0.1)).layerdrop == 0.0
