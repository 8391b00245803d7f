"""Reference log-probs on disk, found again by what they depend on and by nothing else.

One folder per model as it computes: the key hashes the weights, the precision, the attention kernel and the layout. Inside,
rows are found by a hash of the pair's own token ids, which tokenizer, truncation, data and their order end up in: so a
run with another β, loss, learning rate, seed or subset of the data finds its rows, and one with other token ids does not.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from tiltmeter.batch import TokenizedPair
from tiltmeter.files import write_atomically, write_json

_TABLE, _MANIFEST = "log_probs.safetensors", "manifest.json"
_FORMAT = 1


def hash_weights(weights: Mapping[str, Tensor], *, is_first: bool = True) -> str:
    """sha256 over names, dtypes, shapes and bytes of a state dict.

    Args:
        weights: sharded ones are gathered one after the other, so every process must then call this.
        is_first: this process needs the hash; the others get an empty one.
    """
    state = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_first:
            state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            state.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest() if is_first else ""


def hash_pairs(pairs: Sequence[TokenizedPair]) -> Int64[Tensor, "pair 2"]:
    """128 bits of sha256 over each pair's token ids, as two integers."""
    rows = np.empty((len(pairs), 2), dtype=np.int64)
    for row, pair in enumerate(pairs):
        state = hashlib.sha256()
        for ids in pair:
            state.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
        rows[row] = np.frombuffer(state.digest()[:16], dtype=np.int64)
    return torch.from_numpy(rows)


@dataclass
class ReferenceCache:
    """The rows kept for one model.

    Args:
        root: folder of all caches.
        depends_on: everything that the numbers depend on beside the token ids; hashed into the folder's name.
    """

    root: Path
    depends_on: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Folder of this model's rows."""
        text = json.dumps({"format": _FORMAT, **self.depends_on}, sort_keys=True)
        return self.root / hashlib.sha256(text.encode()).hexdigest()[:16]

    def lookup(self, hashes: Int64[Tensor, "pair 2"]) -> tuple[Float[Tensor, "pair 2"], str]:
        """log π₀ of chosen and rejected for each pair, NaN where it is not kept, and why a damaged file was not used.

        A file that is damaged, incomplete or of another format is left alone and not used.
        """
        found = torch.full((len(hashes), 2), torch.nan, dtype=torch.float64)
        kept, complaint = self._read()
        if kept is not None:
            index = {tuple(row): i for i, row in enumerate(kept["hashes"].tolist())}
            places = [index.get(tuple(row), -1) for row in hashes.tolist()]
            known = torch.tensor([place >= 0 for place in places], dtype=torch.bool)
            found[known] = kept["log_probs"][[place for place in places if place >= 0]]
        return found, complaint

    def store(self, hashes: Int64[Tensor, "pair 2"], log_probs: Float[Tensor, "pair 2"]) -> None:
        """Keep rows (NaN rows are left out) beside those kept before; new values win."""
        kept, _ = self._read()
        rows = (
            {}
            if kept is None
            else dict(zip(map(tuple, kept["hashes"].tolist()), kept["log_probs"].tolist(), strict=True))
        )
        known = ~log_probs.isnan().any(1)
        rows.update(zip(map(tuple, hashes[known].tolist()), log_probs[known].double().tolist(), strict=True))
        tensors = {
            "hashes": torch.tensor(list(rows), dtype=torch.int64).reshape(-1, 2),
            "log_probs": torch.tensor(list(rows.values()), dtype=torch.float64).reshape(-1, 2),
        }
        write_atomically(self.folder / _TABLE, lambda path: save_file(tensors, path))
        manifest = {"format": _FORMAT, "n_rows": len(rows), "sha256": _file_hash(self.folder / _TABLE)}
        write_json(self.folder / _MANIFEST, {**manifest, "depends_on": dict(self.depends_on)})

    def _read(self) -> tuple[dict[str, Tensor] | None, str]:
        table, manifest = self.folder / _TABLE, self.folder / _MANIFEST
        if not table.exists() and not manifest.exists():
            return None, ""
        try:
            said = json.loads(manifest.read_text(encoding="utf-8"))
            if said["sha256"] != _file_hash(table):
                return None, f"{table} does not match its manifest"
            if said["depends_on"] != dict(self.depends_on) or said["format"] != _FORMAT:
                return None, f"{table} was made for another model or format"
            return load_file(table), ""
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            return None, f"{self.folder} is damaged ({type(error).__name__})"


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
