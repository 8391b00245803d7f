"""Models to ask again after training: opened from folders or the hub, as weights and never with code of theirs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from analysis.kept_models import check_kept
from tiltmeter.errors import UserError


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_config(where: str | Path, *, revision: str | None = None) -> PretrainedConfig:
    """A model's configuration alone, which says its shape before any weights are read. Raises UserError."""
    config: PretrainedConfig = _or_user_error(
        where, lambda: AutoConfig.from_pretrained(where, **_safe(where, revision))
    )
    return config


def load_tokenizer(where: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer. Raises UserError."""
    found: PreTrainedTokenizerBase = _or_user_error(
        where, lambda: AutoTokenizer.from_pretrained(where, **_safe(where, revision))
    )
    return found


def load_model(
    where: str | Path, *, revision: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> LoadedModel:
    """Open a folder of ``save_pretrained`` or, for anything else, a model of the Hugging Face hub at a revision.

    Raises:
        UserError: missing, damaged, changed since a run wrote it, weights that are not safetensors or not all there, or a
            tokenizer larger than the vocabulary.
    """
    if Path(where).is_dir():
        check_kept(Path(where))
    safe = _safe(where, revision)
    tokenizer = load_tokenizer(where, revision=revision)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "attn_implementation": "sdpa"}
    options["output_loading_info"] = True
    model, found = _or_user_error(where, lambda: AutoModelForCausalLM.from_pretrained(where, **options, **safe))
    if missing := sorted(found["missing_keys"]):  # the library would fill them with random numbers
        raise UserError(f"{where}: damaged: {len(missing)} weights are missing, {missing[0]} among them; restore it")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"{where}: its tokenizer has more tokens than its model; restore the run's own files")
    try:
        return LoadedModel(model.eval().to(device), tokenizer)
    except (RuntimeError, AssertionError, ImportError) as error:  # as PyTorch refuses devices that it wasn't built for
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"device={device}: this model can't be moved there ({reason}); try cpu, or leave it out"
        ) from error


def _safe(where: str | Path, revision: str | None) -> dict[str, Any]:
    """Options under which nothing of a model's own code is run, and folders are never looked up on the hub."""
    place = {"local_files_only": True} if Path(where).is_dir() else {"revision": revision}
    return {"trust_remote_code": False, **place}


def _or_user_error(where: str | Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # whatever a damaged or foreign file makes the loaders raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{where}: cannot load this model ({reason}); restore it or train again") from error
