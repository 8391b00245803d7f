"""Two tiny checkpoints and pairs, as analysis asks them; folders that hold them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.open.checkpoints import Checkpoints
from analysis.open.models import LoadedModel
from analysis.open.probe_pairs import ProbePair
from analysis.registry import ANALYSES
from datamodules.tokenization import PairTokenizer
from tests.tiny_models import MemorySource, make_model, make_tokenizer

TOKENIZER = make_tokenizer()
OF_STATES = tuple(a.name for a in ANALYSES if a.needs.what == "states")
READ_NOW = tuple(name for name in OF_STATES if name not in ("layers_by_step", "similarity"))
"""Figures of hidden states for which one reading of five pairs is enough; likeness takes six."""


def opened(seed: int, family: str = "llama", **changes: Any) -> LoadedModel:
    model = make_model(family, seed=seed, vocab_size=len(TOKENIZER), **changes)
    return LoadedModel(model.eval(), TOKENIZER)


def probe_pairs(n: int) -> list[ProbePair]:
    """Pairs of two sources."""
    records, ids, _ = PairTokenizer(TOKENIZER, 200)(MemorySource(n).load()[0])
    kept = [replace(record, source=f"memory/{i % 2}") for i, record in enumerate(records)]
    return [ProbePair.of(record, tokens) for record, tokens in zip(kept, ids, strict=True)]


def checkpoints(n_pairs: int = 8, *, base: int = 0, aligned: int = 1, **changes: Any) -> Checkpoints:
    return Checkpoints(opened(base, **changes), opened(aligned, **changes), probe_pairs(n_pairs))


def save_model(folder: Path, *, seed: int, tokenizer: Any = TOKENIZER, family: str = "llama", **changes: Any) -> Path:
    """A tiny model as ``save_pretrained`` writes it."""
    make_model(family, attn="eager", seed=seed, vocab_size=len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
