"""Tiny models, data and runs, and a reference for log-probs that shares no code with tiltmeter."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from datamodules.preference import PreferenceDataModule
from datamodules.records import LoadReport, Message, PreferencePair, transcript
from datamodules.tokenization import train_bpe_tokenizer
from lightning_modules.base import LogProbModule
from tiltmeter.models.causal_lm import CausalLM
from tiltmeter.pairs.batch import PAD as PAD_SEGMENT
from tiltmeter.pairs.batch import PreferenceBatch, TokenizedPair

VOCAB, WIDTH, LAYERS, HEADS = 64, 32, 2, 4
PAD, BOS, EOS = 0, 1, 2

_SPECIAL = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_ROTARY = _SPECIAL | {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": _SPECIAL
    | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 256}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": _ROTARY,
    "qwen2": _ROTARY,
    "mistral": _ROTARY | {"sliding_window": None},
    "gemma2": _ROTARY
    | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}
    | {"hidden_activation": "gelu_pytorch_tanh"},
    "gpt_neox": {k: v for k, v in _ROTARY.items() if k != "num_key_value_heads"},
    "cohere": _ROTARY | {"logit_scale": 0.25},
    "granite": _ROTARY | {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "phi": _ROTARY,
    "qwen3": _ROTARY | {"head_dim": 8},
    "gemma3_text": _ROTARY | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
}
"""Family → fields of its configuration. cohere, granite and phi have a scale or a bias in their unembedding."""

FAMILIES = ("gpt2", "llama", "qwen2", "mistral", "gemma2", "gpt_neox")
FLOAT32_NORMS = tuple(family for family in FAMILIES if family != "gpt2")
"""Families whose forward pass drops to float32 inside, whatever the dtype of their weights."""


def make_model(
    family: str, dtype: torch.dtype = torch.float32, attn: str = "sdpa", *, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A random model with weights large enough that attention and normalisation matter."""
    config = AutoConfig.for_model(family, **(ARCHITECTURES.get(family, _SPECIAL) | changes))
    config.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(dtype).train()


def random_pairs(n: int, *, seed: int = 0, longest: int = 9, low: int = 3) -> list[TokenizedPair]:
    """Pairs of 1 to ``longest`` random ids in each segment, none of them a special token."""
    rng = np.random.default_rng(seed)
    segments = [[rng.integers(low, VOCAB, rng.integers(1, longest + 1)).tolist() for _ in range(3)] for _ in range(n)]
    return [TokenizedPair(*three) for three in segments]


def padded_left(batch: PreferenceBatch) -> PreferenceBatch:
    """The same batch with every row's padding moved in front of it."""
    width = batch.input_ids.shape[1]
    shift = (batch.segments == PAD_SEGMENT).sum(1)

    def rolled(x: Tensor) -> Tensor:
        return torch.stack([row.roll(int(by)) for row, by in zip(x, shift, strict=True)])

    names = ("input_ids", "position_ids", "segments")
    moved = {name: rolled(getattr(batch, name)) for name in names}
    return replace(batch, **moved, target_rows=batch.target_rows + shift[batch.target_rows // width])


def reference_log_probs(model: PreTrainedModel, pairs: Sequence[TokenizedPair]) -> Tensor:
    """log π of each chosen, then each rejected: one sequence at a time, float64 softmax, no padding."""
    responses = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    totals = []
    for prompt, response in responses:
        whole = torch.tensor([[*prompt, *response]])
        table = model(input_ids=whole, use_cache=False).logits[0].double().log_softmax(-1)
        first = len(prompt)
        totals.append(sum(table[at - 1, whole[0, at]] for at in range(first, whole.shape[1])))
    return torch.stack(totals)


def largest_difference(a: Tensor, b: Tensor) -> float:
    """max |a − b|, in float64."""
    return (a.detach().double() - b.detach().double()).abs().max().item()


lightning_warnings = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
    "ignore:The '(train|val)_dataloader' does not have many workers",
)
"""For tests that call ``fit``: what Lightning itself does wrong or finds slow."""


@dataclass(frozen=True)
class MemorySource:
    """Random dialogues of very different lengths, each with its own prompt."""

    n_pairs: int
    seed: int = 0
    name: str = "memory"

    def load(self) -> tuple[list[PreferencePair], list[LoadReport]]:
        rng = np.random.default_rng(self.seed)

        def words(longest: int) -> str:
            return " ".join(rng.choice(["tea", "rain", "seven", "kind", "map", "blue"], rng.integers(1, longest)))

        pairs = []
        for i in range(self.n_pairs):
            prompt = (Message("user", f"{i} {words(9)}"),)
            chosen, rejected = f"yes {words(12)}", f"no {words(7)}"
            (text, a), (_, b) = transcript(prompt, chosen), transcript(prompt, rejected)
            sides = Message("assistant", chosen), Message("assistant", rejected)
            pairs.append(PreferencePair(f"memory/{i}", self.name, str(i), prompt, *sides, text, a, b))
        return pairs, [LoadReport(self.name, f"seed {self.seed}", self.n_pairs, self.n_pairs)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges."""
    texts = [p.prompt_text + p.chosen_text for p in MemorySource(20).load()[0]]
    return train_bpe_tokenizer(texts, vocab_size=280)


def make_data(n_train: int, **options: Any) -> PreferenceDataModule:
    """A tokenised data module with ``n_train`` training pairs, two for validation and none to probe."""
    data = PreferenceDataModule(MemorySource(n_train + 2), **({"val_pairs": 2, "probe_pairs": 0} | options))
    data.load()
    data.tokenize(make_tokenizer())
    return data


def fit(
    module: LogProbModule,
    data: PreferenceDataModule,
    *,
    family: str,
    dtype: str,
    max_steps: int = -1,
    accelerator: str = "cpu",
    precision: Any = "32-true",
    ckpt_path: str | None = None,
    reference_cache: Path | None = None,
    **options: Any,
) -> Trainer:
    """Train one epoch, or ``max_steps``, without validation, from the same random weights each time."""
    spec = CausalLM(init="random", dtype=dtype, architecture={"model_type": family} | _sizes(family))
    tokenizer = data.tokenizer
    assert tokenizer is not None

    def build() -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return spec.build(tokenizer)

    module.attach_model(build, reference_cache=reference_cache)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator=accelerator,
        precision=precision,
        max_steps=max_steps,
        use_distributed_sampler=False,
        **({"devices": 1, "max_epochs": 1, "limit_val_batches": 0} | quiet | options),
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def _sizes(family: str) -> dict[str, Any]:
    return {k: v for k, v in ARCHITECTURES[family].items() if k not in _SPECIAL}
