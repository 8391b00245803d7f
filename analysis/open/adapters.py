"""LoRA adapters as aligned models: read as data, checked against the base that they are for, and merged into a copy of it."""

import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from analysis.open.kept_models import check_kept
from tiltmeter.errors import UserError
from tiltmeter.models.lora import is_trained

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_REFUSED = ("megatron_config", "layer_replication")
"""Options under which modules named in the file are imported, or the base gets other layers."""
_NAMES = ("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version")
"""Keys that say where an adapter comes from and not what it does."""
_UNCHANGED = (None, True, False, "gaussian")
"""Ways to begin under which the base itself stays as it is; PiSSA and the like change its weights."""
_QUIET: dict[str, bool] = dict.fromkeys(
    (
        "_raise_exceptions_for_gated_repo",
        "_raise_exceptions_for_missing_entries",
        "_raise_exceptions_for_connection_errors",
    ),
    False,
)


def find_adapter(where: str) -> Path | None:
    """The folder of a PEFT adapter that a folder or hub id means; None for anything else, such as a whole model."""
    if Path(where).is_dir():
        return Path(where) if (Path(where) / CONFIG).is_file() else None
    if _of_hub(where, CONFIG) is None:
        return None
    found = _of_hub(where, WEIGHTS)
    if found is None:
        raise UserError(f"{where}: an adapter without {WEIGHTS}; expected one saved as safetensors")
    return Path(found).parent


def _of_hub(name: str, file: str) -> str | None:
    try:
        return cached_file(name, file, **_QUIET)
    except (OSError, ValueError):  # no name of the hub: a folder that is not there
        return None


def check_adapter(folder: Path, *, base: str) -> LoraConfig:
    """The options of an adapter, if it is for this base.

    What a base is called can only be compared by its name: ``org/model`` and ``some/folder/model`` are taken for the same, and an
    adapter that names no base fits any of its shape.

    Raises:
        UserError: no LoRA adapter, one of another base, or one with options that are not merely weights.
    """
    check_kept(folder)
    path = folder / CONFIG
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, name, start = raw["peft_type"], raw.get("base_model_name_or_path"), raw.get("init_lora_weights")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({str(error)[:80]}); restore it from a copy") from error
    if kind != "LORA":
        raise UserError(f"{path}: expected a LoRA adapter, got {kind}; others can’t be merged into a model")
    wrong = [key for key in _REFUSED if raw.get(key)] + ["init_lora_weights"] * (start not in _UNCHANGED)
    if raw.get("modules_to_save") and raw.get("ensure_weight_tying"):  # peft 0.21 can't read what it saved
        wrong.append("ensure_weight_tying")
    if wrong:
        raise UserError(
            f"{path}: {wrong[0]}={raw[wrong[0]]}: not supported; merge it into its base and give the whole model"
        )
    if name and Path(str(name)).name != Path(base).resolve().name and str(name) != base:
        raise UserError(f"{path}: an adapter of {name}, not of {base}; give the base that it was trained on")
    known = {field.name for field in fields(LoraConfig)} - {*_NAMES, *_REFUSED}
    return LoraConfig(**{key: value for key, value in raw.items() if key in known and value is not None})


def adapter_to_merge(where: str, *, base: str) -> tuple[Path, LoraConfig]:
    """Folder and options of the adapter that training is to start from.

    Raises:
        UserError: no adapter there, one in another format than safetensors, of another base, or not merely weights.
    """
    try:
        folder = find_adapter(where)
        if folder is None:
            raise UserError(f"no LoRA adapter at {where} (expected a folder with {CONFIG} and {WEIGHTS})")
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder}: an adapter without {WEIGHTS}; expected one saved as safetensors")
        return folder, check_adapter(folder, base=base)
    except UserError as error:
        raise UserError(f"model.adapter_path: {error}") from error


def _merged(adapted: PeftModel | PeftMixedModel) -> Any:
    """A plain model, or the adapted one where its family's maps can't be merged, as in training: it computes the same."""
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except (RecursionError, NotImplementedError, AttributeError, TypeError):
        return adapted.get_base_model()


def merge_adapter(model: PreTrainedModel, config: LoraConfig, folder: Path) -> PreTrainedModel:
    """The model with an adapter's weights added to its own, in its own dtype; the model given is used up.

    Modules that were trained whole (``modules_to_save``) take the places of the model's; embeddings and unembedding that were one
    weight are two then, and the model's configuration says so.

    Raises:
        UserError: the weights are missing, damaged, or of another shape; names the folder.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
            )  # peft's own call
            for words in (
                "Model (has|with) `tie_word_embeddings=True`",
                "Input and output embeddings are no longer tied",
            ):
                warnings.filterwarnings("ignore", words)
            adapted = get_peft_model(model, config)
            missed: Any = set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS))
            if missed.unexpected_keys:
                raise ValueError(f"its weight {missed.unexpected_keys[0]} has no place in the model")
            if left := [key for key in missed.missing_keys if is_trained(key)]:
                raise ValueError(f"it has no {left[0]}")
            merged: Any = _merged(adapted)
    except Exception as error:  # whatever a damaged or foreign file makes peft raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{folder}: this adapter does not fit its base ({reason}); give the base it was trained on"
        ) from error
    return merged  # type: ignore[no-any-return]
