"""Folders of shards (torch.distributed.checkpoint) looked through before PyTorch reads them.

PyTorch unpickles their index, and every value that is no tensor, without limits: a folder from somebody else could run
anything. Here both are read first by readers that know only PyTorch's own records, tensors and plain values.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

_INDEX = ".metadata"
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)},
    "pathlib": {"PosixPath"},
}  # fmt: skip
"""Classes that an index is made of. Exact names: with a prefix, ``filesystem`` would lead to ``os.system``."""


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)


def check_shards(folder: Path) -> None:
    """Read the index and every value that is no tensor; tensors are left to PyTorch, which reads them with limits.

    Raises:
        pickle.UnpicklingError: one of them names anything that is no part of a checkpoint.
        OSError, EOFError: a file is missing or cut.
    """
    index = _IndexReader(io.BytesIO((folder / _INDEX).read_bytes())).load()
    if not isinstance(index, Metadata):
        raise pickle.UnpicklingError(f"{_INDEX} holds a {type(index).__name__}, not an index")
    for place, info in index.storage_data.items():
        name = str(info.relative_path)
        if Path(name).name != name or getattr(info, "transform_descriptors", None):
            raise pickle.UnpicklingError(f"{_INDEX} points to {name}, which is no plain file of its folder")
        if isinstance(index.state_dict_metadata.get(place.fqn), BytesStorageMetadata):
            with (folder / name).open("rb") as file:
                file.seek(info.offset)
                torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
