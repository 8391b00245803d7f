"""Models and prompts to ask again after training: loaded as data, from folders or the hub, never with code of theirs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from datamodules.tokenization import SegmentEncoder
from tiltmeter.errors import UserError

PROMPTS_FILE = "probe_prompts.json"
"""List of {pair_id, prompt, chosen, rejected, group, attributes} with exact texts, written by training."""
_PROMPTS_BYTES = 50_000_000
_TEXTS = ("pair_id", "prompt", "chosen", "rejected")


@dataclass(frozen=True)
class ProbePrompt:
    """A held-out pair, exact text."""

    pair_id: str
    prompt: str
    chosen: str
    rejected: str
    group: str = ""
    """Pairs of equal group have one prompt; empty: the pair's own."""
    attributes: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def encode(self, prompts: Sequence[str], *, special_tokens: bool = False) -> list[list[int]]:
        """Token ids as in training: the prompt apart from any response, behind one BOS.

        Args:
            special_tokens: whether words such as ``</s>`` in a prompt mean the token (rendered chat templates).
        """
        encoder, bos = SegmentEncoder(self.tokenizer, special_tokens=special_tokens), self.tokenizer.bos_token_id
        rows = [encoder.encode(text) for text in prompts]
        return rows if bos is None else [row if row[:1] == [bos] else [bos, *row] for row in rows]


def load_model(where: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
    """Open a folder of ``save_pretrained`` or, for anything else, a model of the Hugging Face hub.

    Raises:
        UserError: missing, damaged, weights that are not safetensors, or a tokenizer larger than the vocabulary.
    """
    safe: dict[str, Any] = {"local_files_only": Path(where).is_dir(), "trust_remote_code": False}
    tokenizer = _or_user_error(where, lambda: AutoTokenizer.from_pretrained(where, **safe))
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "attn_implementation": "sdpa"}
    model = _or_user_error(where, lambda: AutoModelForCausalLM.from_pretrained(where, **options, **safe))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"{where}: its tokenizer has more tokens than its model; restore the run's own files")
    return LoadedModel(model.eval().to(device), tokenizer)


def read_prompts(path: Path, *, n_prompts: int) -> list[ProbePrompt]:
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
        return [_read_prompt(entry) for entry in entries[:n_prompts]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: expected a list of objects with {', '.join(_TEXTS)} as texts ({str(error)[:80]}); "
            "remove it to have a report without samples"
        ) from error


def _read_prompt(entry: Any) -> ProbePrompt:
    attributes = entry.get("attributes", {})
    if not all(isinstance(value, str | int | float | bool) for value in attributes.values()):
        raise TypeError("attributes that are no single values")
    texts = {name: _text(entry[name]) for name in _TEXTS}
    return ProbePrompt(**texts, group=_text(entry.get("group", texts["pair_id"])), attributes=attributes)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"got {type(value).__name__}")
    return value.encode("utf-8", "replace").decode("utf-8")  # JSON can hold half a surrogate pair, UTF-8 can't


def _or_user_error(where: str | Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # whatever a damaged or foreign file makes the loaders raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{where}: cannot load this model ({reason}); restore it or train again") from error
