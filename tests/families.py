"""Families of causal language models as random toys, and what this project can do with each: the rows of docs/families.md.

``python -m tests.families`` writes the table again.
"""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from analysis.open.checkpoints import HeldOutPairs
from analysis.open.read_states import StateReading
from datamodules.preference import PreferenceDataModule
from launch.config_keys import config_key
from launch.configuration import CONF
from lightning_modules.dpo import DPOModule
from tests.tiny_models import MemorySource, make_tokenizer, reference_log_probs
from tiltmeter.errors import UserError, arguments_shown
from tiltmeter.models.causal_lm import CausalLM
from tiltmeter.models.lora import add_lora, merged_state, why_not_merged
from tiltmeter.pairs.batch import TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
TOLERANCE = 1e-6
"""Of a log-prob, relative: float32."""

_GROUPED = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED |= {"num_key_value_heads": 2, "max_position_embeddings": 256}
_PLAIN = {name: size for name, size in _GROUPED.items() if name != "num_key_value_heads"}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_HEAD = _GROUPED | {"head_dim": 8}
_GEMMA = _HEAD | {"query_pre_attn_scalar": 8}
_EXPERTS = _GROUPED | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_EXPERTS = _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = _GROUPED | {"num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
_LATENT |= {"v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_STATES = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "apertus": _GROUPED,
    "arcee": _HEAD,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": _GPT | {"n_ctx": 256, "rotary_dim": 4},
    "cohere": _GROUPED | {"logit_scale": 0.25},
    "cohere2": _HEAD | {"sliding_window": 64},
    "deepseek_v3": _LATENT | {"q_lora_rank": 8},
    "diffllama": _GROUPED,
    "ernie4_5": _HEAD,
    "falcon": _PLAIN,
    "falcon_mamba": _STATES,
    "gemma": _HEAD,
    "gemma2": _GEMMA | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": _GEMMA | {"sliding_window": 64},
    "glm": _HEAD | {"pad_token_id": 0},
    "glm4": _HEAD,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 64, "max_position_embeddings": 256}
    | {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": _PLAIN,
    "gpt_oss": _LOCAL_EXPERTS | {"head_dim": 8, "sliding_window": 64},
    "gptj": _GPT | {"rotary_dim": 4},
    "granite": _GROUPED | {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "granitemoe": _LOCAL_EXPERTS,
    "helium": _HEAD,
    "lfm2": _GROUPED | {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None},
    "llama": _GROUPED,
    "mamba": _STATES,
    "mistral": _GROUPED | {"sliding_window": None},
    "mixtral": _LOCAL_EXPERTS | {"sliding_window": None},
    "modernbert-decoder": _PLAIN | {"local_attention": 64},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "expansion_ratio": 2},
    "nanochat": _GROUPED,
    "nemotron": _HEAD,
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "olmoe": _EXPERTS,
    "opt": _PLAIN | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "persimmon": _PLAIN,
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "phimoe": _LOCAL_EXPERTS | {"sliding_window": None},
    "qwen2": _GROUPED,
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3": _HEAD,
    "recurrent_gemma": _GROUPED
    | {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 64}
    | {"block_types": ["recurrent", "recurrent", "attention"]},
    "rwkv": _STATES | {"attention_hidden_size": 32, "intermediate_size": 64, "context_length": 256},
    "smollm3": _GROUPED,
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED | {"sliding_window": None},
}
"""Family → sizes of a toy."""


class Row(NamedTuple):
    """What came of one family, in words."""

    family: str
    training: str
    attention: str
    states: str
    lora: str

    def __str__(self) -> str:
        return f"| {' | '.join(self)} |"


@dataclass
class Toy:
    """A random model of a family, always the same, and the options that it was found to need."""

    family: str
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]
    layout: str = "shared_prefix"

    @property
    def spec(self) -> CausalLM:
        sizes = dict(FAMILIES[self.family]) | self.settings
        return CausalLM(init="random", architecture={"model_type": self.family} | sizes)

    def build(self) -> PreTrainedModel:
        """Weights large enough that attention and normalisation matter."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = self.spec.build(self.tokenizer)
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
        return model

    @property
    def options(self) -> list[str]:
        """Those that are not the usual ones, as they are set."""
        layout = [] if self.layout == "shared_prefix" else [f"datamodule.layout={self.layout}"]
        return layout + [f"`{name}`: {value} in its config.json" for name, value in self.settings.items()]


@cache
def shipped() -> DictConfig:
    """What train.py composes: the page names its keys."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=["adapter=lora"])


def try_family(family: str) -> Row:
    """:func:`_try_family` with messages as the command line has them."""
    with arguments_shown(lambda name: config_key(name, shipped())):
        return _try_family(family)


def _try_family(family: str) -> Row:
    """Train two steps, compare log-probs with transformers alone, open in analyze.py's code path, merge adapters.

    A refusal that names an option is followed; any other is the result.

    Raises:
        AssertionError: a number is wrong.
    """
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|endoftext|>"])  # transformers adds it to any tokenizer of Qwen2
    toy = Toy(family, tokenizer, {})
    for _ in range(3):
        try:
            module, data = _train(toy)
            break
        except UserError as error:
            if "layout=concatenated" in str(error) and toy.layout != "concatenated":
                toy.layout = "concatenated"
            elif setting := re.search(r"set (\w+) \(", str(error)):
                toy.settings[setting[1]] = 0.0
            else:
                return Row(family, f"refused: {_said(error)}", "", "", "")
    model = module.trained_policy.model
    kernel = "packed" if data.packs else model.config._attn_implementation
    pairs = list(data.splits["train"].pairs[:3])
    assert _log_probs_differ(toy, model, pairs, packed=data.packs) <= TOLERANCE
    by = f"works with {', '.join(toy.options)}" if toy.options else "works"
    return Row(family, by, kernel, _read_states(toy, model), _merge(toy, pairs))


def _train(toy: Toy) -> tuple[DPOModule, PreferenceDataModule]:
    data = PreferenceDataModule(
        MemorySource(6),
        val_pairs=2,
        probe_pairs=0,
        pairs_per_step=2,
        layout=toy.layout,  # type: ignore[arg-type]
    )
    data.load()
    data.tokenize(toy.tokenizer)
    module = DPOModule(learning_rate=1e-3)
    module.attach_model(toy.build)
    quiet: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=2, limit_val_batches=0, use_distributed_sampler=False, **quiet
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    return module, data


@torch.no_grad()
def _log_probs_differ(toy: Toy, model: PreTrainedModel, pairs: list[TokenizedPair], *, packed: bool) -> float:
    """Largest relative difference to transformers alone: another model object, on its own kernel, a sequence at a time."""
    batch = collate_pairs(pairs, pair_index=range(len(pairs)), layout=toy.layout, packed=packed)  # type: ignore[arg-type]
    ours = sequence_log_probs(model, batch)
    alone = toy.build()
    alone.load_state_dict(model.state_dict())
    return _differ(ours, reference_log_probs(alone, pairs))


def _read_states(toy: Toy, model: PreTrainedModel) -> str:
    with tempfile.TemporaryDirectory() as folder:
        base, aligned = Path(folder, "base"), Path(folder, "aligned")
        for where, saved in ((base, toy.build()), (aligned, model)):
            saved.save_pretrained(where)
            toy.tokenizer.save_pretrained(where)
        try:
            opened, _, _ = HeldOutPairs(n_pairs=4, max_length=200).ask(str(base), str(aligned), MemorySource(5))
            read = StateReading(n_pairs=4, n_random_updates=2).read(opened)
        except UserError as error:
            return f"left out: {_said(error)}"
    assert read.n_pairs == 4
    assert read.at() is not None, "states moved"
    return "read"


@torch.no_grad()
def _merge(toy: Toy, pairs: list[TokenizedPair]) -> str:
    config, by = LoraConfig(r=2), "merged exactly"
    for attempt in range(3):
        try:
            if (reason := why_not_merged(toy.spec.build_on_meta(toy.tokenizer), config)) is not None:
                return f"adapter/ only: {reason}"
            adapted = toy.build()
            add_lora(adapted, config)
            break
        except UserError as error:
            option = re.search(r"module\.lora\.target_modules=\[([\w,]+)\]", str(error))
            if option is None or attempt == 2:
                return f"refused: {_said(error)}"
            config, by = LoraConfig(r=2, target_modules=option[1].split(",")), f"merged exactly with {option[0]}"
    before = reference_log_probs(adapted, pairs)
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    after = reference_log_probs(adapted, pairs)
    plain = toy.build()
    add_lora(plain, config)
    merged_state(plain, adapted.state_dict())
    assert not any("lora" in name for name, _ in plain.named_modules())
    differs, moved = _differ(reference_log_probs(plain, pairs), after), _differ(before, after)
    assert differs <= TOLERANCE < moved / 10, (differs, moved)
    return by


def _differ(a: Tensor, b: Tensor) -> float:
    return float(((a.double() - b.double()) / b.double()).abs().max())


def _said(error: UserError) -> str:
    """The reason without what depends on the machine."""
    return re.sub(r"\s*\([^)]*\)", "", str(error)).split(";")[0].removeprefix("model: ").replace("|", "/")


HEAD = """# Families of models

What `tests/test_families.py` found with random toys of two blocks, made from the configurations of the installed transformers:
each is trained for two steps, its log-probs are compared with those of transformers alone (float32, 1e-6 relative), its base and
policy are opened and their hidden states read as `analyze.py` does, and LoRA adapters on every linear map are merged (1e-6
relative). `python -m tests.families` writes this page again.

- *training*: as it is, with the option that the one line of the refusal names, or refused in that line.
- *attention*: what was chosen without being told; `packed` is rows without padding, `sdpa` and `eager` are padded rows. A family
  without scaled-dot-product attention gets `eager` by itself; `model.attn_implementation` and, for two checkpoints,
  `attn_implementation=eager` set it.
- *hidden states*: whether the sections of the report that need them are there; what a family can't do is left out by name.
- *LoRA*: whether `aligned/` is a plain model with the adapters merged into it.

| family | training | attention | hidden states | LoRA |
|---|---|---|---|---|
"""

if __name__ == "__main__":
    PAGE.write_text(HEAD + "".join(f"{try_family(family)}\n" for family in FAMILIES), encoding="utf-8")
