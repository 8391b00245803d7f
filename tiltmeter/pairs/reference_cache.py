"""Reference log-probs on disk, found again by what they depend on and by nothing else.

One folder per model as it computes: the key hashes the weights, the whole configuration, the precision, the attention
kernel, the libraries and the layout. Inside, rows are found by a hash of the pair's own token ids, which tokenizer,
truncation, data and their order end up in: so a run with another β, loss, learning rate, seed or subset of the data finds
its rows, and one with other token ids does not. Each row knows the micro-batch that it was computed in, so that it can be
computed again bit for bit: in 16 bit another micro-batch gives other numbers.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tiltmeter.files import sha256_of, write_atomically, write_json
from tiltmeter.pairs.batch import TokenizedPair

_TABLE, _MANIFEST = "log_probs.safetensors", "manifest.json"
_FORMAT = 2
_NAMES = ("_name_or_path", "transformers_version")
"""Fields of a configuration that say where it comes from and not what is computed."""


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


def forward_identity(model: PreTrainedModel, device: torch.device) -> dict[str, str]:
    """Names everything beside weights and input that a forward pass depends on: configuration, kernels, libraries, processor."""
    config = json.dumps(_without_names(model.config.to_dict()), sort_keys=True, default=str)
    on_cpu = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return {
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "dtype": str(model.dtype),
        "attention": str(model.config._attn_implementation),
        "experts": str(getattr(model.config, "_experts_implementation", None)),
        "libraries": f"torch {version('torch')}, transformers {version('transformers')}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
    }


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_names(inner) for name, inner in value.items() if name not in _NAMES}
    return value


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
class Kept:
    """Cached reference log-probs of a split's pairs.

    Args:
        log_probs: [pair, 2] log π₀ of chosen and rejected, NaN where it is not kept.
        micro_batches: rows of pairs whose kept values come from one forward pass over just these, in this order.
        complaint: why a file was not used; empty where there is none or it was.
    """

    log_probs: Tensor
    micro_batches: list[list[int]]
    complaint: str = ""


@dataclass
class ReferenceCache:
    """Reference log-probs kept on disk for one model.

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

    def lookup(self, hashes: Int64[Tensor, "pair 2"]) -> Kept:
        """Read what is kept of these pairs. A file that is damaged, incomplete or of another format is left alone and not used."""
        found = torch.full((len(hashes), 2), torch.nan, dtype=torch.float64)
        kept, complaint = self._read()
        if kept is None:
            return Kept(found, [], complaint)
        index = {tuple(row): i for i, row in enumerate(kept["hashes"].tolist())}
        places = [index.get(tuple(row), -1) for row in hashes.tolist()]
        known = torch.tensor([place >= 0 for place in places], dtype=torch.bool)
        found[known] = kept["log_probs"][[place for place in places if place >= 0]]
        return Kept(found, _whole_batches(kept["computed_in"], {place: row for row, place in enumerate(places)}))

    def store(
        self,
        hashes: Int64[Tensor, "pair 2"],
        log_probs: Float[Tensor, "pair 2"],
        micro_batches: Sequence[Sequence[int]],
        *,
        beside_others: bool = True,
    ) -> None:
        """Keep rows that were computed, unless they are NaN; new values win.

        Args:
            micro_batches: the rows, as they were computed together.
            beside_others: keep what was kept before too.
        """
        kept = self._read()[0] if beside_others else None
        rows: dict[tuple[int, ...], tuple[list[float], list[int]]] = {}
        if kept is not None:
            known = zip(kept["log_probs"].tolist(), kept["computed_in"].tolist(), strict=True)
            rows = dict(zip(map(tuple, kept["hashes"].tolist()), known, strict=True))
        first = 1 + max((where[0] for _, where in rows.values()), default=-1)
        names, values = hashes.tolist(), log_probs.double().tolist()
        for number, batch in enumerate(micro_batches, first):
            rows.update(
                (tuple(names[row]), (values[row], [number, place, len(batch)]))
                for place, row in enumerate(batch)
                if not any(map(math.isnan, values[row]))
            )
        tensors = {
            "hashes": torch.tensor(list(rows), dtype=torch.int64).reshape(-1, 2),
            "log_probs": torch.tensor([v for v, _ in rows.values()], dtype=torch.float64).reshape(-1, 2),
            "computed_in": torch.tensor([where for _, where in rows.values()], dtype=torch.int64).reshape(-1, 3),
        }
        write_atomically(self.folder / _TABLE, lambda path: save_file(tensors, path))
        manifest = {"format": _FORMAT, "n_rows": len(rows), "sha256": sha256_of(self.folder / _TABLE)}
        write_json(self.folder / _MANIFEST, {**manifest, "depends_on": dict(self.depends_on)})

    def _read(self) -> tuple[dict[str, Tensor] | None, str]:
        table, manifest = self.folder / _TABLE, self.folder / _MANIFEST
        if not table.exists() and not manifest.exists():
            return None, ""
        try:
            said = json.loads(manifest.read_text(encoding="utf-8"))
            if said["sha256"] != sha256_of(table):
                return None, f"{table} does not match its manifest"
            if said["depends_on"] != dict(self.depends_on) or said["format"] != _FORMAT:
                return None, f"{table} was made for another model or format"
            return load_file(table), ""
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            return None, f"{self.folder} is damaged ({type(error).__name__})"


def _whole_batches(computed_in: Tensor, row_of: Mapping[int, int]) -> list[list[int]]:
    """Rows of each micro-batch that is there as a whole, in their order."""
    batches: dict[int, list[tuple[int, int]]] = {}
    for at, (batch, place, size) in enumerate(computed_in.tolist()):
        if at in row_of:
            batches.setdefault(batch, [(size, 0)]).append((place, row_of[at]))
    whole = [sorted(rows) for (size, _), *rows in batches.values() if len(rows) == size]
    return [[row for _, row in rows] for rows in whole]
