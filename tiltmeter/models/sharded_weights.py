"""A model made without its weights, which are read once it is sharded: each process reads its own share from the files.

So no process ever holds the whole model, neither in its own memory nor on its device.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from tiltmeter.errors import UserError, argument
from tiltmeter.models.lora import plain_name

WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "generation_config.json")
"""Patterns of the names that weight files have on the hub."""


@dataclass(frozen=True)
class EmptyModel:
    """A causal language model whose parameters are on the meta device, and where their numbers are; buffers are real."""

    model: PreTrainedModel
    folder: Path
    """Folder of the safetensors files."""
    stored: dict[str, str]
    """Name of a parameter in the model → its name in the files."""

    def read_weights(self, device: torch.device) -> None:
        """Give every parameter that is on the meta device, sharded or not, its numbers from the files, in its own dtype.

        All processes of a sharded model must call this; each reads its own rows. Parameters that are one (tied) stay one.

        Raises:
            UserError: a file can't be read.
        """
        modules = dict(self.model.named_modules())
        made: dict[int, nn.Parameter] = {}
        wanted: dict[str, nn.Parameter] = {}
        for name, empty in list(self.model.named_parameters(remove_duplicate=False)):
            if not empty.is_meta:
                continue
            if id(empty) not in made:
                made[id(empty)] = nn.Parameter(torch.empty_like(empty, device=device), empty.requires_grad)
                wanted[self.stored[plain_name(name)]] = made[id(empty)]
            module, _, attribute = name.rpartition(".")
            setattr(modules[module], attribute, made[id(empty)])
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is a fine number
                load(dict(wanted), storage_reader=HuggingFaceStorageReader(str(self.folder)))
        except CheckpointException as failed:
            reason = next(iter(failed.failures.values()))[0]
            raise UserError(
                f"{argument('CausalLM.name_or_path')}: cannot read weights in {self.folder}: {reason}"
            ) from failed


def make_empty(folder: Path, make: Callable[[], PreTrainedModel]) -> EmptyModel | None:
    """A model without weights beside its files; None where these hold its weights in another form than the model does.

    Args:
        folder: of safetensors files.
        make: makes the model from its configuration; called where new parameters take no memory.
    """
    with init_empty_weights(include_buffers=False):
        model = make()
    model.tie_weights()  # inside, each name got a parameter of its own
    stored = _stored_names(model, _shapes(sorted(folder.glob("model*.safetensors"))))
    if stored is None or any(True for _ in _persistent_buffers(model)):
        return None
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return EmptyModel(model.eval(), folder, stored)


def _shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in some files, from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return shapes


def _stored_names(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> dict[str, str] | None:
    """Parameter → its name in the files, by transformers' own rules; None: not every one is there as it is."""
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    if len(renamings) < len(changes):
        return None  # tensors have to be split, merged or turned
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored: dict[int, str] = {}
    for name, shape in shapes.items():
        target, _ = rename_source_key(name, renamings, [], model.base_model_prefix, parameters)
        if target in parameters and tuple(parameters[target].shape) == shape:
            stored[id(parameters[target])] = name
    if any(id(parameter) not in stored for parameter in parameters.values()):
        return None
    return {name: stored[id(parameter)] for name, parameter in parameters.items()}


def _persistent_buffers(model: nn.Module) -> Iterable[str]:
    return model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
