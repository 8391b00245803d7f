"""What the base and the aligned model say to the same held-out prompts, greedily, side by side."""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from analysis.runs import Run
from datamodules.tokenization import SegmentEncoder
from tiltmeter.errors import UserError

PROMPTS_FILE = "probe_prompts.json"
"""List of {pair_id, prompt, chosen, rejected} with exact texts, written by training."""
N_PROMPTS = 4
MAX_NEW_TOKENS = 48
_PROMPTS_BYTES = 1_000_000
_WEIGHT_BYTES = 4 * 2**30
"""Larger models are not sampled here: this runs on the CPU in float32."""
_SHARED_WORDS = 3
_FIELDS = ("pair_id", "prompt", "chosen", "rejected")


@dataclass(frozen=True)
class ProbePrompt:
    """A held-out pair, exact text."""

    pair_id: str
    prompt: str
    chosen: str
    rejected: str


class Span(NamedTuple):
    """A stretch of words, and whether the other model said something else there."""

    text: str
    differs: bool


@dataclass(frozen=True)
class Continuation:
    """What a model said, and whether it was cut at the token limit."""

    spans: tuple[Span, ...]
    is_cut: bool

    @property
    def is_blank(self) -> bool:
        """Nothing that could be read."""
        return not any(span.text.strip() for span in self.spans)


@dataclass(frozen=True)
class Sample:
    """One prompt and both continuations."""

    prompt: ProbePrompt
    base: Continuation
    aligned: Continuation


@dataclass(frozen=True)
class Samples:
    """Samples, or one sentence on why there are none."""

    rows: Sequence[Sample]
    note: str = ""


def compare_samples(run: Run) -> Samples:
    """Greedy continuations of a run's first probe prompts by base/ and aligned/.

    Raises:
        UserError: a file is damaged or a model can't be loaded.
    """
    prompts = read_prompts(run.folder / PROMPTS_FILE)
    if not prompts:
        return Samples([], f"The run folder has no {PROMPTS_FILE}, so it isn't known which held-out prompts to ask.")
    if note := _why_not(run):
        return Samples([], note)
    texts = [p.prompt for p in prompts]
    is_template = run.setting("datamodule.text_format") == "chat_template"
    said = [continue_greedily(folder, texts, special_tokens=is_template) for folder in (run.base, run.aligned)]
    rows = [Sample(p, *_apart(b, a)) for p, b, a in zip(prompts, *said, strict=True)]
    return Samples(rows)


def read_prompts(path: Path) -> list[ProbePrompt]:
    """The first prompts of the file; none when there is no file.

    Raises:
        UserError: the file is not what training writes.
    """
    if not path.is_file():
        return []
    if path.stat().st_size > _PROMPTS_BYTES:
        raise UserError(f"{path}: more than {_PROMPTS_BYTES} bytes; remove it to have a report without samples")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [ProbePrompt(**{name: _text(entry[name]) for name in _FIELDS}) for entry in entries[:N_PROMPTS]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path}: expected a list of objects with {', '.join(_FIELDS)} as texts ({str(error)[:80]}); "
            "remove it to have a report without samples"
        ) from error


@torch.inference_mode()
def continue_greedily(folder: Path, prompts: Sequence[str], *, special_tokens: bool = False) -> list[tuple[str, bool]]:
    """The likeliest next token, up to 48 times, after each prompt.

    Prompts are encoded as in training: apart from the response, behind one BOS, cut from the left where they don't fit.

    Args:
        folder: a model saved by training.
        prompts: exact texts.
        special_tokens: whether words such as ``</s>`` in a prompt mean the token (rendered chat templates).

    Returns:
        text and whether it was cut at the limit, for each prompt.
    """
    tokenizer, model = _load_model(folder)
    encoder = SegmentEncoder(tokenizer, special_tokens=special_tokens)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    longest = int(getattr(model.config, "max_position_embeddings", 2048)) - MAX_NEW_TOKENS - len(bos)
    rows = [_behind_bos(encoder.encode(text), bos, longest) for text in prompts]
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    model.generation_config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=pad, eos_token_id=eos, use_cache=True
    )
    generated = model.generate(input_ids=ids, attention_mask=mask)[:, width:].tolist()
    return [(str(tokenizer.decode(_until(row, eos), skip_special_tokens=True)), eos not in row) for row in generated]


def _behind_bos(ids: list[int], bos: list[int], longest: int) -> list[int]:
    ids = ids[1:] if bos and ids[:1] == bos else ids
    return bos + ids[-longest:]


def _until(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids


def _load_model(folder: Path) -> tuple[PreTrainedTokenizerBase, Any]:
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = _or_user_error(folder, lambda: AutoTokenizer.from_pretrained(folder, **safe))
    model = _or_user_error(
        folder,
        lambda: AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, attn_implementation="sdpa", **safe
        ),
    )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"{folder}: its tokenizer has more tokens than its model; restore the run's own files")
    return tokenizer, model.eval()


def _or_user_error(folder: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # whatever a damaged or foreign file makes the loaders raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{folder}: cannot load this model ({reason}); restore it or train again") from error


def _why_not(run: Run) -> str:
    """One sentence when the models can't be sampled here."""
    if not (run.base / "config.json").is_file():
        name = run.setting("model.name_or_path") or "a model on the Hugging Face hub"
        return f"base/ only points to {name}; samples are drawn offline, from models inside the run folder."
    size = sum(file.stat().st_size for file in run.aligned.glob("*.safetensors"))
    if size > _WEIGHT_BYTES:
        return f"The aligned model has {size / 2**30:.0f} GiB of weights, too many to sample on a CPU for a report."
    return ""


def _apart(base: tuple[str, bool], aligned: tuple[str, bool]) -> tuple[Continuation, Continuation]:
    """Mark the words in which two texts differ; fewer than three shared words in a row don't count as shared.

    >>> said = _apart((" I like tea in the morning", False), (" I like rain in the morning", False))
    >>> [[s.text for s in side.spans if s.differs] for side in said]
    [[' tea'], [' rain']]
    """
    words = [re.findall(r"\s*\S+|\s+$", text) for text, _ in (base, aligned)]
    whole = (len(words[0]), len(words[1]), 0)
    blocks = difflib.SequenceMatcher(None, words[0], words[1], autojunk=False).get_matching_blocks()
    shared = [b for b in blocks if b.size >= _SHARED_WORDS or (b.size and 0 in (b.a, b.b) and b.a == b.b)]
    return tuple(  # type: ignore[return-value]
        Continuation(_spans(words[k], [(b[k], b[k] + b[2]) for b in [*shared, whole]]), is_cut)
        for k, (_, is_cut) in enumerate((base, aligned))
    )


def _spans(words: list[str], shared: list[tuple[int, int]]) -> tuple[Span, ...]:
    spans, done = [], 0
    for start, end in shared:
        spans += [Span("".join(words[done:start]), True), Span("".join(words[start:end]), False)]
        done = end
    return tuple(span for span in spans if span.text)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"got {type(value).__name__}")
    return value.encode("utf-8", "replace").decode("utf-8")  # JSON can hold half a surrogate pair, UTF-8 can't
