"""Rows of the unembedding out of a saved model's files, read as data: no model is built and no more is read than asked for."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from analysis.open.kept_models import check_kept
from tiltmeter.errors import UserError

_NAMES = ("lm_head.weight", "embed_out.weight", "model.embed_tokens.weight", "transformer.wte.weight")
"""Names that families have for it; the latter two are input embeddings, which tied models use for both and store once."""
_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def unembedding_rows(folder: Path, token_ids: Sequence[int]) -> Float[Tensor, "token d_model"] | None:
    """e_t for each token, in float32 or better; None where the folder holds no safetensors model or none of a known name.

    Raises:
        UserError: a file is damaged, or has no such token; names the file.
    """
    found = _in_parts(folder / _INDEX) if (folder / _INDEX).is_file() else _in_one_file(folder / _ONE_FILE)
    if found is None:
        return None
    check_kept(folder)
    path, name = found
    wanted = sorted(set(token_ids))
    try:
        with safe_open(path, framework="pt") as file:
            weight = file.get_slice(name)
            size = int(weight.get_shape()[0])
            if wanted and not 0 <= wanted[0] <= wanted[-1] < size:
                raise UserError(f"{path}: has {size} tokens, so no token {wanted[-1]}; it is not the run's own model")
            rows = {token: weight[token : token + 1] for token in wanted}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    table = torch.cat([rows[token] for token in token_ids])
    return table.to(torch.promote_types(table.dtype, torch.float32))


def _in_parts(index: Path) -> tuple[Path, str] | None:
    """The file of a sharded model that holds the unembedding, and its name there."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return next(((index.parent / Path(places[name]).name, name) for name in _NAMES if name in places), None)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(index, error) from error


def _in_one_file(path: Path) -> tuple[Path, str] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    return next(((path, name) for name in _NAMES if name in there), None)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged ({str(error)[:80]}); restore it from a copy")
