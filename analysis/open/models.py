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

from analysis.open.kept_models import check_kept
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import choose_attention
from tiltmeter.models.model_files import Part, find_fault, reason_of
from tiltmeter.models.quantization import check_blocks, dequantized, is_quantized


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_config(where: str | Path, *, revision: str | None = None) -> PretrainedConfig:
    """A model's configuration alone, which says its shape before any weights are read. Raises UserError."""
    config: PretrainedConfig = _or_user_error(
        where, "config", lambda: AutoConfig.from_pretrained(where, **_safe(where, revision))
    )
    return config


def load_tokenizer(where: str | Path, *, revision: str | None = None, is_model: bool = True) -> PreTrainedTokenizerBase:
    """A model's tokenizer, or one that lies by itself or beside an adapter. Raises UserError."""
    found: PreTrainedTokenizerBase = _or_user_error(
        where, "tokenizer", lambda: AutoTokenizer.from_pretrained(where, **_safe(where, revision)), is_model=is_model
    )
    return found


def load_model(
    where: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    attn_implementation: str | None = None,
) -> LoadedModel:
    """Open a folder of ``save_pretrained`` or, for anything else, a model of the Hugging Face hub at a revision.

    Args:
        attn_implementation: ``sdpa`` or ``eager``; None: :func:`tiltmeter.models.causal_lm.choose_attention`.

    Quantized weights become plain ones, the numbers that they stand for.

    Raises:
        UserError: missing, damaged, changed since a run wrote it, weights that are not safetensors or not all there, or a
            tokenizer larger than the vocabulary.
    """
    if Path(where).is_dir():
        check_kept(Path(where))
    safe = _safe(where, revision)
    tokenizer = load_tokenizer(where, revision=revision)
    config = load_config(where, revision=revision)
    is_quantized(config, str(where))
    kernel = choose_attention(config, attn_implementation)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "attn_implementation": kernel}
    options["output_loading_info"] = True
    model, found = _or_user_error(
        where, "weights", lambda: AutoModelForCausalLM.from_pretrained(where, **options, **safe)
    )
    if missing := sorted(found["missing_keys"]):  # the library would fill them with random numbers
        raise UserError(f"{where}: damaged: {len(missing)} weights are missing, {missing[0]} among them; restore it")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"{where}: its tokenizer has more tokens than its model; restore the run's own files")
    check_blocks(model, str(where))
    model = dequantized(model, dtype)
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


def _or_user_error(where: str | Path, part: Part, load: Callable[[], Any], *, is_model: bool = True) -> Any:
    if Path(where).is_dir() and (fault := find_fault(str(where), part, is_model=is_model)):
        raise UserError(f"{where}: cannot load this model: {fault}")
    try:
        return load()
    except Exception as error:  # whatever a damaged or foreign file makes the loaders raise
        if fault := find_fault(str(where), part, is_model=is_model):
            raise UserError(f"{where}: cannot load this model: {fault}") from error
        reason = reason_of(error, str(where))
        if not Path(where).exists():
            raise UserError(
                f"{where}: cannot load this model ({reason}); expected a folder, or a name of the Hugging Face hub (check the "
                "network and, for a gated model, `hf auth login`)"
            ) from error
        raise UserError(f"{where}: cannot load this model ({reason}); restore it or train again") from error
