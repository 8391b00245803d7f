"""The work that both sides of a comparison do: token ids, their order, and a model from scratch. Imports no trainer."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from datamodules.hh import AnthropicHH
from datamodules.records import LoadReport, Message, PreferencePair, transcript
from datamodules.sampler import epoch_order
from datamodules.tokenization import PairTokenizer, train_bpe_tokenizer
from tiltmeter.errors import UserError
from tiltmeter.pairs.batch import TokenizedPair

MAX_LENGTH = 512
BETA = 0.1
CURVE_STEPS = 20
"""Optimizer steps over which the loss curves are compared."""
HEAD_TOKENS, HEAD_WIDTH = 4096, 256
"""Completion tokens and width of the hidden states whose head is measured alone."""


@dataclass(frozen=True)
class Shape:
    """A model from scratch, and how it is trained."""

    architecture: dict[str, Any]
    learning_rate: float
    freeze_embeddings: bool = False
    vocab_size: int | None = None
    """None: that of the tokenizer."""


SHAPES = {
    "tiny": Shape(
        {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
        | {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024},
        learning_rate=1e-4,
    ),
    "qwen_0.5b": Shape(
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
        | {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 4096}
        | {"tie_word_embeddings": True},
        learning_rate=1e-6,
        vocab_size=151_936,
    ),
    "llama2_7b": Shape(
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
        learning_rate=1e-6,
        freeze_embeddings=True,
        vocab_size=32_000,
    ),
}


@dataclass(frozen=True)
class Settings:
    """What a worker is told; travels as JSON."""

    folder: str
    """Where the token ids and the tokenizer are."""
    variant: str
    """Which of a module's sides this is."""
    shape: str
    device: str
    pairs_per_step: int
    pairs_per_micro_batch: int
    tokens_per_micro_batch: int | None
    """tiltmeter's; None: the default of its data module."""
    turns: tuple[int, ...]
    """Optimizer steps of each turn; the first turn is not timed."""
    n_measured: int
    """Turns after the first whose time is compared; the rest only draws the loss curve."""
    lora_rank: int | None = None
    """Train adapters on every linear map of the blocks; None: the weights."""

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters."""
        if self.lora_rank is None:
            return None
        return LoraConfig(r=self.lora_rank, lora_alpha=2 * self.lora_rank, target_modules="all-linear")

    @property
    def n_steps(self) -> int:
        """Optimizer steps in all."""
        return sum(self.turns)

    @property
    def model_shape(self) -> Shape:
        """The model."""
        return SHAPES[self.shape]

    def changed(self, **fields: Any) -> "Settings":
        """The same with some fields replaced."""
        return replace(self, **fields)

    def as_json(self) -> dict[str, Any]:
        """For the command line of a worker."""
        return asdict(self)


def default_data() -> Path | None:
    """The HH file that the stated figures are about, if it can be had."""
    root = os.environ.get("TILTMETER_SHARED")
    path = Path(root or ".") / "data" / "hh-rlhf" / "harmless-base_test.part80.jsonl.gz"
    return path if root and path.exists() else None


class HHLengths:
    """Stand-in for HH where no file can be had: meaningless words, with the numbers of tokens of HH harmless-base."""

    name = "stand-in"

    def __init__(self, n_pairs: int) -> None:
        self.n_pairs = n_pairs

    def load(self) -> tuple[list[PreferencePair], list[LoadReport]]:
        """Pairs whose segments have log-normal lengths with the means and spreads of HH harmless-base in 4,096 tokens."""
        rng = np.random.default_rng(0)
        syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
        words = np.array([a + b for a in syllables for b in syllables])

        def text(median: float, spread: float) -> str:
            n_words = int(np.clip(rng.lognormal(np.log(median), spread), 2, MAX_LENGTH))
            return " ".join(rng.choice(words[:3500], n_words))

        pairs = []
        for i in range(self.n_pairs):
            prompt = (Message("user", text(98, 0.8)),)
            sides = Message("assistant", text(31, 0.85)), Message("assistant", text(40, 0.85))
            (start, chosen), (_, rejected) = (transcript(prompt, side.content) for side in sides)
            pairs.append(PreferencePair(str(i), self.name, str(i), prompt, *sides, start, chosen, rejected))
        return pairs, [LoadReport(self.name, "seed 0", self.n_pairs, self.n_pairs)]


def prepare(folder: Path, data: str | None, n_pairs: int) -> str:
    """Tokenise, choose ``n_pairs`` at random, and write ids and tokenizer for the workers; returns the data in words."""
    path = data or default_data()
    pairs, reports = (AnthropicHH(str(path)) if path else HHLengths(max(2 * n_pairs, 1500))).load()
    texts = [p.prompt_text + response for p in pairs for response in (p.chosen_text, p.rejected_text)]
    tokenizer = train_bpe_tokenizer(texts, vocab_size=4096)
    _, tokenized, _ = PairTokenizer(tokenizer, MAX_LENGTH)(pairs)
    if len(tokenized) < n_pairs:
        raise UserError(
            f"--data: {n_pairs} pairs are wanted and {len(tokenized)} are there; choose a larger file, or fewer --rounds, "
            "--steps or --pairs-per-step"
        )
    rows = np.random.default_rng(1).permutation(len(tokenized))[:n_pairs]
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "pairs.json").write_text(json.dumps([tokenized[row] for row in rows]))
    means = [float(np.mean([len(tokenized[row][i]) for row in rows])) for i in range(3)]
    name = f"{reports[0].source}" if path else "a stand-in of random words with the lengths of HH harmless-base"
    lengths = "{:.0f} + {:.0f} + {:.0f}".format(*means)
    return (
        f"{n_pairs} pairs of {name}, prompt + chosen + rejected = {lengths} tokens on average, BPE of {len(tokenizer)}"
    )


def load_pairs(folder: str) -> list[TokenizedPair]:
    """The token ids that :func:`prepare` wrote."""
    return [TokenizedPair(*ids) for ids in json.loads((Path(folder) / "pairs.json").read_text())]


def random_order(settings: Settings, n_pairs: int) -> list[int]:
    """Rows in the order in which tiltmeter's optimizer steps take them."""
    order: list[int] = epoch_order(n_pairs, seed=0, epoch=0, shuffle=True).tolist()
    return order[: settings.n_steps * settings.pairs_per_step]


def sorted_order(settings: Settings, pairs: Sequence[TokenizedPair]) -> list[int]:
    """The best that can be done by hand for a trainer that pads every micro-batch to its longest row.

    The pairs of all measured turns together are sorted by length and cut into micro-batches, so that they hold as
    little padding as can be; these are dealt to the steps like cards, so that all turns take about as long.
    """
    order = random_order(settings, len(pairs))
    per_step, per_batch = settings.pairs_per_step, settings.pairs_per_micro_batch
    first = settings.turns[0] * per_step
    last = first + sum(settings.turns[1 : 1 + settings.n_measured]) * per_step

    def width(row: int) -> int:
        prompt, chosen, rejected = (len(ids) for ids in pairs[row])
        return prompt + max(chosen, rejected)

    by_length = sorted(order[first:last], key=width)
    batches = [by_length[at : at + per_batch] for at in range(0, len(by_length), per_batch)]
    n_steps = (last - first) // per_step
    dealt = [row for step in range(n_steps) for batch in batches[step::n_steps] for row in batch]
    return order[:first] + dealt + order[last:]


def n_useful(pairs: Sequence[TokenizedPair]) -> int:
    """Tokens of some pairs, each prompt once, no padding."""
    return sum(len(ids) for pair in pairs for ids in pair)


def build_model(shape: Shape, vocab_size: int, special_ids: dict[str, Any], device: str) -> PreTrainedModel:
    """The same random model in every process; in float32 on a CPU, in bfloat16 on a GPU."""
    config = AutoConfig.for_model(
        **shape.architecture, vocab_size=shape.vocab_size or vocab_size, use_cache=False, **special_ids
    )
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model
