"""GGUF models, converted once and found again by the sha256 of their file."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from analysis.open.kept_models import check_made, record_made
from launch.run_folder import is_first_process
from launch.screen import console
from tiltmeter.errors import UserError, argument
from tiltmeter.files import sha256_of, write_atomically
from tiltmeter.models.causal_lm import CausalLM
from tiltmeter.models.gguf_file import SUFFIX, convert_gguf, find_gguf

Model = TypeVar("Model", bound=CausalLM)
_FORMAT = 1
"""Part of a folder's name; raise it when the same file would give other weights."""


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
    folder = root / "cache" / "models" / f"{digest[:16]}-{_FORMAT}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            if is_first_process():
                console().print(f"Converting {path.name} once into {folder} …", soft_wrap=True)
            write_atomically(folder, lambda partial: _convert(path, partial, folder.name))
            return str(folder)
    if is_first_process():
        check_made(folder)
    return str(folder)


def _convert(path: Path, partial: Path, name: str) -> None:
    convert_gguf(path, partial)
    record_made(partial, name, file=path.name)
