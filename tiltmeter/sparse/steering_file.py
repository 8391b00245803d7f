"""A trained steering on disk: its own numbers as safetensors, and which autoencoder's features they steer."""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tiltmeter.errors import UserError
from tiltmeter.files import write_atomically
from tiltmeter.pairs.reference_cache import hash_weights
from tiltmeter.sparse.autoencoder import SparseAutoencoder
from tiltmeter.sparse.files import load_sae
from tiltmeter.sparse.steering import SparseOptions, SparseSteering

STEERING_FILE = "steering.safetensors"
"""Its file in a folder of what was trained."""
_KEY = "sparse_steering"
_PARTS = ("weight", "bias", "threshold")


class StoredSteering(NamedTuple):
    """A steering as its file says it, with the autoencoder that it belongs to."""

    sae: SparseAutoencoder
    options: SparseOptions
    tensors: dict[str, Tensor]
    """W_A [width, d_model], b_A and τ [width]."""

    def fill(self, steering: SparseSteering) -> SparseSteering:
        """Put the trained numbers into a steering of the same autoencoder."""
        for name, tensor in self.tensors.items():
            getattr(steering, name).data.copy_(tensor)
        return steering


def open_sae(options: SparseOptions) -> SparseAutoencoder:
    """The autoencoder that options name. Raises UserError as :func:`tiltmeter.sparse.files.load_sae`."""
    return load_sae(options.sae, options.folder, revision=options.revision, site=options.site)


def save_steering(path: Path, steering: SparseSteering, options: SparseOptions) -> None:
    """Write W_A, b_A and τ, where the autoencoder is, and its sha256; whole or not at all.

    Raises:
        FailedWrite: the disk is full or not writable.
    """
    tensors = {name: getattr(steering, name).detach().float().cpu().contiguous() for name in _PARTS}
    local = Path(options.sae).expanduser()
    known = {
        "sae": str(local.resolve()) if local.is_dir() else options.sae, "folder": options.folder,
        "revision": options.revision, "site": steering.site, "any_model": options.any_model,
        "sha256": _hash(steering.sae),
    }  # fmt: skip
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={_KEY: json.dumps(known)}))


def load_steering(path: Path) -> StoredSteering:
    """Read a steering and the autoencoder whose features it steers, which has to be the very one.

    Raises:
        UserError: no such file, a damaged one, or an autoencoder that is gone or another one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            known = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in _PARTS}
        digest = known.pop("sha256")
        options = SparseOptions(**known)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file (expected a safetensors file of a steering)") from error
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged, or no file of a steering ({error!r}); restore it from a copy") from error
    try:
        sae = open_sae(options)
    except UserError as error:
        raise UserError(f"{path}: its autoencoder can't be read: {error}") from error
    if _hash(sae) != digest:
        raise UserError(
            f"{path}: the autoencoder in {options.sae} is another one than it was trained with; restore that one"
        )
    return StoredSteering(sae, options, tensors)


def _hash(sae: SparseAutoencoder) -> str:
    """sha256 of an autoencoder's weights, in float32."""
    return hash_weights({name: tensor.detach().float() for name, tensor in sae.state_dict().items()})
