"""The real checkpoint stories260K (llama2.c format) as a Hugging Face Llama folder with a fast tokenizer."""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

UNK, BOS, EOS = 0, 1, 2
MARKER = "▁"


class Sizes(NamedTuple):
    """The header of a llama2.c file."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    max_length: int


def convert(source: Path, target: Path) -> Path:
    """Write config, safetensors and tokenizer of ``source`` into the folder ``target`` and return it."""
    model = read_model(source / "stories260K.bin")
    model.save_pretrained(target)
    read_tokenizer(source / "tok512.bin").save_pretrained(target)
    return target


def read_model(path: Path) -> LlamaForCausalLM:
    """A llama2.c checkpoint as a Llama in float32."""
    raw = path.read_bytes()
    sizes = Sizes(*struct.unpack_from("<7i", raw))
    values = torch.from_numpy(np.frombuffer(raw, dtype="<f4", offset=28).copy())
    dim, hidden, layers, heads, kv_heads, vocab, max_length = sizes
    head = dim // heads
    used = 0

    def take(*shape: int) -> Tensor:
        nonlocal used
        block = values[used : used + int(np.prod(shape))].view(*shape)
        used += block.numel()
        return block

    state = {"model.embed_tokens.weight": take(vocab, dim)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    blocks = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": half_split(take(layers, heads, head, dim)),
        "self_attn.k_proj": half_split(take(layers, kv_heads, head, dim)),
        "self_attn.v_proj": take(layers, kv_heads * head, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    for name, block in blocks.items():
        state |= {f"model.layers.{i}.{name}.weight": block[i] for i in range(layers)}
    state["model.norm.weight"] = take(dim)
    assert values.numel() - used == max_length * head, "what is left are the two tables of the rotary embedding"
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model


def half_split(rows: Tensor) -> Tensor:
    """[layer, head, row, dim] with rotary pairs (0,1), (2,3) … to pairs (0,h/2), (1,h/2+1) …, heads joined."""
    return torch.cat([rows[:, :, 0::2], rows[:, :, 1::2]], dim=2).flatten(1, 2)


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """A llama2.c tokenizer: the best-scoring adjacent pair is merged until none is left, as ranked BPE merges."""
    scores: dict[str, float] = {}
    raw, at = path.read_bytes(), 4
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        piece = raw[at + 8 : at + 8 + length].decode()
        at += 8 + length
        name = {UNK: "<unk>", BOS: "<s>", EOS: "</s>"}.get(len(scores), piece.replace(" ", MARKER))
        assert name not in scores
        scores[name] = score
    words = list(scores)[EOS + 257 :]
    splits = [(word[:i], word[i:]) for word in words for i in range(1, len(word))]
    merges = [pair for pair in splits if pair[0] in scores and pair[1] in scores]
    merges.sort(key=lambda pair: -scores["".join(pair)])
    vocabulary = {piece: i for i, piece in enumerate(scores)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARKER), normalizers.Replace(" ", MARKER)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(MARKER, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
