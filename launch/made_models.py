"""Models made once below ``runs/cache`` and found again by what they were made from: GGUF files converted, weights quantized."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from analysis.open.kept_models import check_made, record_made
from launch.run_folder import is_first_process
from launch.screen import console
from tiltmeter.errors import UserError, argument
from tiltmeter.files import sha256_of, write_atomically
from tiltmeter.models.causal_lm import CausalLM
from tiltmeter.models.gguf_file import SUFFIX, convert_gguf, find_gguf

Model = TypeVar("Model", bound=CausalLM)
FORMAT = 1
"""Part of what models are found by; raise it when the same input would give others."""


def made_once(folder: Path, make: Callable[[Path], object], *, title: str, **facts: object) -> bool:
    """Make a model's folder where it isn't there yet, one process at a time; True where it was found, and is as it was written.

    Args:
        folder: below ``runs/cache``; its name says what the model is made from.
        make: writes the model into a folder of another name, which is renamed afterwards.
        title: what is said of the making on the screen; empty: nothing.
        facts: what it is made from, kept in its record.

    Raises:
        UserError: it was changed since it was written, or ``make`` raised.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # processes of one run, too
        if folder.is_dir():
            if is_first_process():
                check_made(folder)
            return True
        if title and is_first_process():
            console().print(f"{title} once into {folder} …", soft_wrap=True)

        def write(partial: Path) -> None:
            make(partial)
            record_made(partial, folder.name, **facts)

        write_atomically(folder, write)
        return False


def made_from(model: CausalLM, tokenizer: PreTrainedTokenizerBase, **facts: object) -> dict[str, object]:
    """Everything that a model made from another one depends on: the other one's weights and tokenizer, and ``facts``."""
    local = sorted(Path(str(model.name_or_path)).glob("*.safetensors"))
    return {
        "format": FORMAT, "base": str(model.name_or_path), "revision": model.revision, "dtype": model.dtype,
        "weights": {path.name: sha256_of(path) for path in local}, "tokenizer": tokenizer.backend_tokenizer.to_str(), **facts,
    }  # fmt: skip


def folder_of(root: Path, kind: str, facts: dict[str, object]) -> Path:
    """Folder ``root/cache/<kind>/<hash of the facts>``."""
    return root / "cache" / kind / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def without_gguf(model: Model, root: Path) -> Model:
    """The model with its GGUF file, where it is one, converted to a folder; ``revision`` then is the file's sha256.

    Raises:
        UserError: no such file, another sha256, or :func:`~tiltmeter.models.gguf_file.convert_gguf` can't read it.
    """
    name = str(model.name_or_path)
    if not name.endswith(SUFFIX):
        return model
    return replace(model, name_or_path=converted(name, root, sha256=model.revision), revision=None)


def converted(name: str, root: Path, *, sha256: str | None = None) -> str:
    """Name of a model, or for a GGUF file the folder below ``root/cache/models`` that holds it as safetensors, made if need be.

    Args:
        sha256: that the file is to have; None: any.

    Raises:
        UserError: as :func:`without_gguf`, or the folder was changed since it was written.
    """
    if not name.endswith(SUFFIX):
        return name
    path = find_gguf(name)
    digest = sha256_of(path)
    if sha256 is not None and digest != sha256:
        raise UserError(
            f"{argument('CausalLM.revision')}: expected sha256 {sha256[:12]}… of {path}, found "
            f"{digest[:12]}…; take the same file, or null"
        )
    folder = root / "cache" / "models" / f"{digest[:16]}-{FORMAT}"
    made_once(folder, lambda partial: convert_gguf(path, partial), title=f"Converting {path.name}", file=path.name)
    return str(folder)


def quantized(model: CausalLM, tokenizer: PreTrainedTokenizerBase, root: Path) -> tuple[CausalLM, str]:
    """The model with its weights quantized, as a folder below ``root/cache/quantized``; and one line on where it is kept.

    Raises:
        UserError: the model can't be read, or was changed since it was written.
    """
    facts = made_from(model, tokenizer, quantization=model.quantization)
    folder = folder_of(root, "quantized", facts)

    def make(partial: Path) -> None:
        model.build(tokenizer).save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    found = made_once(folder, make, title=f"Quantizing {model.name_or_path} to {model.quantization}", **facts)
    start = replace(model, name_or_path=str(folder), revision=None, tokenizer=None, quantization=None)
    return start, f"Base: {model.name_or_path} in {model.quantization}, {'found' if found else 'kept'} in {folder}"
