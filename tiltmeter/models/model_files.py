"""Finds what keeps the files of a model from being opened, and says it in a line with what to do."""

import json
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any, Literal

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.hub import cached_file

from tiltmeter.commands import setting

Part = Literal["config", "tokenizer", "weights"]
_ADAPTER = "adapter_config.json"
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json"
)  # fmt: skip
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NO_SAFETENSORS = "no weights as safetensors"


def find_fault(where: str, part: Part, *, is_model: bool = True) -> str | None:
    """Say why a part of a model can't be opened, as far as its files show: the end of a sentence that names it; None: they don't.

    Args:
        where: folder, or hub id, of which what was downloaded before is looked at.
        part: that is to be opened; ``config`` is looked at before any other.
        is_model: false: a folder of a tokenizer alone.
    """
    folder = Path(where)
    if not folder.is_dir():
        return _fault_of_config(found) if (found := _downloaded(where)) else None
    if is_model and (fault := _fault_of_config(folder)):
        return fault
    if part == "tokenizer" and not _holds(folder, *_TOKENIZERS):
        return (
            "it has no tokenizer (expected tokenizer.json or the like); copy that of the model it was made from into it "
            "(train.py also takes model.tokenizer=…)"
        )
    if part == "weights" and not _holds(folder, "*.safetensors"):
        if _holds(folder, *_PICKLED):
            return f"{_NO_SAFETENSORS} but pickled ones, which are not read here; {_convert(where)}"
        return f"{_NO_SAFETENSORS} (expected model.safetensors); copy them into it, or save the model again"
    return None


def reason_of(error: Exception, where: str) -> str:
    """The first sentence of a library's message, on one line; what it advises is for those who write programs."""
    text = " ".join(str(error).split())
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than config.json says; take both from one model"
    if "safetensors" in text and "does not appear to have" in text:
        return f"{_NO_SAFETENSORS}; {_convert(where)}"
    text = re.sub(r"^Class validation error for validator \S+ \w+: ", "", text)
    text = re.split(r"(?<=[.!?])\s+(?=[A-Z])|: \(1\)", text, maxsplit=1)[0]
    return textwrap.shorten(text, 200, placeholder=" …") or type(error).__name__


def _fault_of_config(folder: Path) -> str | None:
    if (folder / _ADAPTER).is_file():
        return _say_adapter(folder)
    path = folder / "config.json"
    if not path.is_file():
        return _say_no_model(folder)
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"config.json: damaged ({' '.join(str(error).split())[:80]}); restore it"
    family = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(family, str):
        return "config.json names no model_type; take the file of the model it was made from"
    if family in CONFIG_MAPPING:
        if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return f"{family} is no causal language model; choose one that continues text, such as llama or gpt2"
        return None
    if "auto_map" in config:
        return f"{family} needs Python code that comes with it, which is never run here; choose a family that transformers knows"
    return (
        f"transformers {transformers.__version__} knows no model_type {family}; choose another model, or a transformers that "
        "knows it"
    )


def _say_adapter(folder: Path) -> str:
    try:
        base = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError):
        base = None
    base = str(base or "ITS_BASE")
    return (
        f"an adapter, expected a whole model; go on from it with {setting('model.name_or_path', base)} "
        f"{setting('model.adapter_path', folder)}, or "
        f"compare both with analyze.py {setting('base', base)} {setting('aligned', folder)}"
    )


def _say_no_model(folder: Path) -> str:
    said = "no config.json in it, so no model (expected what save_pretrained writes)"
    if inside := sorted(path.parent for path in folder.glob("*/config.json")):
        aligned = folder / "aligned"
        return f"{said}; give the one inside, {aligned if aligned in inside else inside[-1]}"
    return f"{said}; choose another folder, or copy the file of the model it was made from into it"


def _convert(where: str) -> str:
    code = (
        f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({where!r}, use_safetensors=False)"
        f".save_pretrained({(where if Path(where).is_dir() else Path(where).name)!r})"
    )
    return f"convert them once, if you trust them: python -c {shlex.quote(code)}"


def _downloaded(name: str) -> Path | None:
    """The folder of a hub model's small files, where they have been downloaded."""
    for file in (_ADAPTER, "config.json"):
        try:
            found = cached_file(name, file, local_files_only=True)
        except (OSError, ValueError):
            continue
        if found:
            return Path(found).parent
    return None


def _holds(folder: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))
