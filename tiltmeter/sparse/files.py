"""Files of sparse autoencoders: Gemma Scope 1 and 2, SAELens's folders and our own, from disk or the hub; never pickle.

========================================= ===========================================================================
files                                     holds
========================================= ===========================================================================
``params.npz``, Gemma Scope 1             ``W_enc, W_dec, b_enc, b_dec, threshold``
``params.safetensors``, Gemma Scope 2     the same, ``w_enc`` and ``w_dec`` in small letters; no ``config.json`` is needed
``sae_weights.safetensors``, ``cfg.json`` SAELens, and ours: ``threshold`` or ``log_threshold``, or none
========================================= ===========================================================================

``W_enc`` is [d_model, width] there and ``W_dec`` [width, d_model]; one the other way round is turned. What a file holds beyond
these, or asks for and we don't do, is refused: no number is read that would mean something else here.
"""

import json
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltmeter.errors import UserError
from tiltmeter.files import write_atomically, write_json
from tiltmeter.models.layers import is_site, layer_site
from tiltmeter.sparse.autoencoder import KINDS, JumpReLU, SaeId, SparseAutoencoder, TopK

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
"""Files of our own folder, named and laid out as SAELens's."""
_GEMMA_1, _GEMMA_2, _GEMMA_CONFIG = "params.npz", "params.safetensors", "config.json"
_READ = (_GEMMA_1, _GEMMA_2, WEIGHTS, CONFIG, _GEMMA_CONFIG)
_PARTS = ("W_enc", "W_dec", "b_enc", "b_dec")
_OWN = "tiltmeter"
"""Key of cfg.json with what only our own files say."""
_RESIDUAL = re.compile(r"(?:blocks\.(\d+)\.hook_resid_(post|pre)|(?:\w+\.)*(?:layers|h)\.(\d+)(?:\.output)?)")
"""Names of the residual stream: TransformerLens's, and a decoder block of transformers, whose output it is."""


def load_sae(
    source: str | Path,
    folder: str | None = None,
    *,
    revision: str | None = None,
    site: str | None = None,
    mean_norm: float | int | None = None,
) -> SparseAutoencoder:
    """Read a sparse autoencoder from a folder or from the hub.

    Args:
        source: a folder, or a hub id such as ``google/gemma-scope-2-270m-it``.
        folder: inside it, such as ``resid_post/layer_12_width_16k_l0_medium``.
        revision: commit or tag on the hub.
        site: where it reads, for files that don't say so.
        mean_norm: mean length of the states that it is for, where it was trained on states rescaled by one
            (``expected_average_only_in``); the factor √d / mean_norm is then put into its weights.

    Raises:
        UserError: not found, damaged, pickled, of another kind, or of another site than the residual stream.

    Units of ``mean_norm``: activation units.
    """
    where = _find(source, folder, revision)
    file = next((where / name for name in (_GEMMA_1, _GEMMA_2, WEIGHTS) if (where / name).is_file()), None)
    if file is None:
        raise UserError(f"{where}: {_why_none(where)}")
    read = _read_saelens if file.name == WEIGHTS else _read_gemma
    try:
        made = read(file, f"{source}/{folder or ''}", site, mean_norm)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return made.requires_grad_(False).eval()


def save_sae(sae: SparseAutoencoder, folder: Path, *, about: Mapping[str, Any] | None = None) -> None:
    """Write an autoencoder as a folder that :func:`load_sae` reads; whole or not at all.

    Args:
        about: how it was made, in plain values.

    Raises:
        FailedWrite: the disk is full or not writable.
    """

    def write(temporary: Path) -> None:
        temporary.mkdir()
        write_sae(sae, temporary, about=about)

    write_atomically(folder, write)


def write_sae(sae: SparseAutoencoder, folder: Path, *, about: Mapping[str, Any] | None = None) -> None:
    """:func:`save_sae` into a folder that is there."""
    state = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
    tensors = {
        "W_enc": state.pop("encoder_weight").t(), "W_dec": state.pop("decoder_weight"),
        "b_enc": state.pop("encoder_bias"), "b_dec": state.pop("decoder_bias"), **state,
    }  # fmt: skip
    layer = re.fullmatch(r"layer_(\d+)", sae.site)
    config = {
        "architecture": sae.kind, "d_in": sae.d_model, "d_sae": sae.width, "device": "cpu",
        "dtype": str(sae.decoder_bias.dtype).removeprefix("torch."), "apply_b_dec_to_input": sae.subtracts_bias,
        "normalize_activations": sae.norm, "model_name": sae.id.model,
        "hook_name": f"blocks.{int(layer[1])}.hook_resid_post" if layer else sae.site,
        **sae.options(), _OWN: {"site": sae.site, "weights": sae.id.weights, "about": dict(about or {})},
    }  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, config)


def _find(source: str | Path, folder: str | None, revision: str | None) -> Path:
    """The folder on this machine, fetched from the hub if it is there."""
    local, inside = Path(source).expanduser(), folder or "."
    if local.is_dir() or str(source).startswith((".", "/", "~")):
        where = local / inside
        if not where.is_dir():
            raise UserError(f"{where}: no such folder (expected one with {', '.join(_READ[:3])})")
        return where
    wanted = [name if folder is None else f"{folder.strip('/')}/{name}" for name in _READ]
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted)) / inside
    except Exception as error:  # whatever the hub's client raises
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{source}: cannot be read from the Hugging Face hub ({reason}); check name, network and login, or give a folder"
        ) from error


def _why_none(where: Path) -> str:
    pickled = sorted(path.name for path in where.glob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt"))
    expected = f"expected {', '.join(_READ[:3])}"
    if pickled:
        return (
            f"{pickled[0]} is pickled, which could run code and is never read; {expected}: convert it where it was made"
        )
    return f"no sparse autoencoder is here ({expected}); give the folder of one"


def _read_gemma(file: Path, path: str, site: str | None, mean_norm: float | int | None) -> SparseAutoencoder:
    """Gemma Scope's JumpReLU, which reads states as they are."""
    if mean_norm is not None:
        raise UserError("mean_norm: Gemma Scope reads states as they are; leave it out")
    tensors = {re.sub("^w_", "W_", name): tensor for name, tensor in _tensors(file).items()}
    config = _json(file.with_name(_GEMMA_CONFIG)) if file.with_name(_GEMMA_CONFIG).is_file() else {}
    if config.get("type", "sae") != "sae" or config.get("affine_connection"):
        raise UserError(f"a {config.get('type')}, expected a sparse autoencoder of one site")
    hook = config.get("hf_hook_point_in")
    known = _gemma_site(path) if hook is None else _site_of(str(hook))
    name = SaeId(_settle(site, known), str(config.get("model_name") or ""))
    made = _assemble(JumpReLU, name, tensors, {})
    said = re.search(r"average_l0_(\d+)", path)
    l0 = config.get("l0", said and said[1])
    made.published_l0 = None if l0 is None else float(l0)
    return made


def _gemma_site(path: str) -> str | None:
    """Site by the names of Gemma Scope's repositories and folders, which are all that says it; None: they don't."""
    layers = re.findall(r"layer_(\d+)", path)
    is_residual = re.search(r"(^|/)resid_post|-res(-all)?(/|$)", path)
    return layer_site(int(layers[-1])) if layers and is_residual else None


def _read_saelens(file: Path, path: str, site: str | None, mean_norm: float | int | None) -> SparseAutoencoder:
    """SAELens's standard (ReLU), JumpReLU and TopK, or our own."""
    config = _json(file.with_name(CONFIG))
    config = {**config, **config.get("metadata", {})}
    tensors = _tensors(file)
    architecture, options = _architecture(config)
    own = config.get(_OWN, {})
    hook = config.get("hook_name") or config.get("hook_point") or ""
    name = SaeId(
        _settle(site, own.get("site") or _site_of(str(hook))), config.get("model_name") or "", own.get("weights", "")
    )
    if not bool((tensors.pop("scaling_factor", torch.ones(1)) == 1).all()):
        raise UserError("scaling_factor (finetuning_scaling_factor): not read here; fold it into W_dec first")
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    options["subtracts_bias"] = bool(config.get("apply_b_dec_to_input", True))
    norm = config.get("normalize_activations") or "none"
    if norm in (True, "expected_average_only_in"):
        _fold_mean_norm(tensors, mean_norm)
        norm = "none"
    elif mean_norm is not None:
        raise UserError(
            f"mean_norm: only for normalize_activations=expected_average_only_in, this has {norm}; leave it out"
        )
    if config.get("rescale_acts_by_decoder_norm") and architecture == "topk":
        lengths = tensors["W_dec"].norm(dim=1)
        tensors |= {"W_enc": tensors["W_enc"] * lengths, "b_enc": tensors["b_enc"] * lengths}
        tensors["W_dec"] = tensors["W_dec"] / lengths[:, None]
    if architecture == "standard":
        tensors["threshold"] = torch.zeros_like(tensors["b_enc"])
    return _assemble(KINDS.get(architecture, JumpReLU), name, tensors, options | {"norm": norm})


def _architecture(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Architecture and its options, of any version of cfg.json."""
    architecture = config.get("architecture") or "standard"
    kwargs = config.get("activation_fn_kwargs") or {}
    if architecture == "topk" or "topk" in (config.get("activation_fn_str"), config.get("activation_fn")):
        k = config.get("k", kwargs.get("k"))
        if k is None:
            raise UserError(f"{CONFIG}: k: expected the number of features that topk keeps, found none")
        return "topk", {"k": int(k)}
    if architecture not in ("standard", "jumprelu"):
        raise UserError(f"{CONFIG}: architecture: expected standard, jumprelu or topk, got {architecture}")
    return architecture, {}


def _fold_mean_norm(tensors: dict[str, Tensor], mean_norm: float | int | None) -> None:
    """Put the factor √d / mean norm of the states into the weights."""
    if mean_norm is None or not mean_norm > 0:
        raise UserError(
            "normalize_activations=expected_average_only_in: it reads states of mean length √d_model; give mean_norm, that "
            "of the states that it was trained on"
        )
    factor = math.sqrt(len(tensors["b_dec"])) / mean_norm
    tensors |= {
        "W_enc": tensors["W_enc"] * factor,
        "W_dec": tensors["W_dec"] / factor,
        "b_dec": tensors["b_dec"] / factor,
    }


def _site_of(hook: str) -> str:
    """Our name of a hook's site."""
    if is_site(hook):
        return hook
    found = _RESIDUAL.fullmatch(hook)
    if found is None or (found[2] == "pre" and found[1] == "0"):
        raise UserError(
            f"reads {hook or 'a site that it does not name'}, expected the residual stream behind a block (hook_resid_post, or the "
            "output of a layer); take one of resid_post"
        )
    return layer_site(int(found[1] or found[3]) - (found[2] == "pre"))


def _settle(given: str | None, known: str | None) -> str:
    if known is None and given is None:
        raise UserError(
            "site: neither file nor path says where it reads; give site=layer_NN, the block behind which it does"
        )
    if given is not None and known is not None and given != known:
        raise UserError(f"site: expected {known}, where it was trained, got {given}; leave site out")
    return str(known or given)


def _assemble(
    kind: type[JumpReLU] | type[TopK], name: SaeId, tensors: dict[str, Tensor], options: Mapping[str, Any]
) -> SparseAutoencoder:
    """An autoencoder with these weights, once they are all that belongs to its kind and of one size."""
    expected = {*_PARTS, "threshold"} if kind is JumpReLU else {*_PARTS}
    for what, names in (("is missing", expected - {*tensors}), ("is unknown", {*tensors} - expected)):
        if names:
            raise UserError(f"{sorted(names)[0]} {what}; a {kind.kind} autoencoder has {', '.join(sorted(expected))}")
    width, d_model = tensors["b_enc"].numel(), tensors["b_dec"].numel()
    dtype = torch.promote_types(tensors["W_dec"].dtype, torch.float32)
    turned = {
        "encoder_weight": _row_a_feature(tensors, "W_enc", width, d_model, turn_square=True),
        "decoder_weight": _row_a_feature(tensors, "W_dec", width, d_model, turn_square=False),
        "encoder_bias": tensors["b_enc"], "decoder_bias": tensors["b_dec"],
    }  # fmt: skip
    if kind is JumpReLU:
        turned["threshold"] = tensors["threshold"]
    for name_of, tensor in turned.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{name_of}: expected finite numbers, got NaN or infinity; restore the file")
    made = kind(name, d_model, width, **options)
    try:
        made.load_state_dict({key: tensor.to(dtype).contiguous() for key, tensor in turned.items()}, assign=True)
    except RuntimeError as error:
        raise UserError(f"weights of sizes that don't go together: {' '.join(str(error).split())[:160]}") from error
    return made


def _row_a_feature(tensors: Mapping[str, Tensor], name: str, width: int, d_model: int, *, turn_square: bool) -> Tensor:
    """A matrix with a row for each feature; a square one is as its format has it."""
    matrix = tensors[name]
    shapes = {(width, d_model): matrix, (d_model, width): matrix.t()}
    shape = (matrix.shape[0], matrix.shape[-1])
    if matrix.ndim != 2 or shape not in shapes:
        raise UserError(
            f"{name}: expected {width} × {d_model}, by b_enc and b_dec, got {' × '.join(map(str, matrix.shape))}"
        )
    if width == d_model:
        return matrix.t() if turn_square else matrix
    return shapes[shape]


def _tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file, pickled ones never."""
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        return load_file(file)
    except (SafetensorError, OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"damaged, or pickled inside, which is never read ({' '.join(str(error).split())[:120]}); fetch it again"
        ) from error


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file.name}: expected a JSON file beside it ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file.name}: expected settings by name, found something else; fetch it again")
    return found
