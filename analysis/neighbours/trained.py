"""Names of methods that were trained, and what training them took: numbers that were fitted, and minutes."""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from analysis.open.models import LoadedModel
from analysis.open.runs import Run
from tiltmeter.errors import UserError


def name_of(run: Run) -> str:
    """Name of another run's method: its adapter where it has one, else its arm or loss."""
    if run.setting("module.vector.both_signs"):
        return "bipo"
    if run.node("module.vector"):
        return "constant_vector"
    for node, name in (("module.lora", "lora"), ("module.sparse", "fsrl")):
        if run.node(node):
            return name
    arm = run.setting("arm")
    return str(arm) if arm not in (None, "dpo") else f"{run.setting('module.loss') or 'sigmoid'} ({run.folder.name})"


def n_changed(base: LoadedModel, other: LoadedModel) -> int:
    """Numbers in the weights of which any differs."""
    own = base.model.state_dict()
    return sum(
        x.numel() for name, x in other.model.state_dict().items() if name in own and not torch.equal(x, own[name])
    )


def n_in_adapter(folder: Path) -> int:
    """Numbers in the files of an adapter; 0 where there is none."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(path), framework="pt") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:100]})") from error
    return total
