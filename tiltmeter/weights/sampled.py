"""A fixed sample of a model's weights while it trains: enough to tell how many changed, without a second copy of the model."""

import hashlib

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from tiltmeter.models.layers import decoder_blocks

N_ENTRIES = 2**20
"""Entries of the sample; the share of 10⁶ entries is known to ± .001."""


def sampled_weights(model: PreTrainedModel, *, n_entries: int = N_ENTRIES, seed: int = 0) -> Float[Tensor, " entry"]:
    """The same random entries of the matrices of all decoder blocks at every call, as bfloat16 on the CPU; adapters are added.

    Each matrix has entries in proportion to its size, at least one. Quantized matrices are passed over: theirs don't change.
    """
    matrices: dict[str, tuple[Tensor, LoraLayer | None]] = {}
    for i, block in enumerate(decoder_blocks(model)):
        adapted: dict[int, LoraLayer] = {
            id(module.get_base_layer().weight): module for module in block.modules() if isinstance(module, LoraLayer)
        }
        for name, parameter in block.named_parameters():
            if ".lora_" not in name and parameter.ndim > 1 and parameter.is_floating_point():
                matrices[f"{i}.{name.replace('.base_layer', '')}"] = (parameter, adapted.get(id(parameter)))
    total = sum(parameter.numel() for parameter, _ in matrices.values())
    found = [
        _entries(parameter, adapter, max(1, n_entries * parameter.numel() // total), f"{seed} {name}")
        for name, (parameter, adapter) in matrices.items()
    ]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.bfloat16)


@torch.no_grad()
def _entries(parameter: Tensor, adapter: LoraLayer | None, n: int, key: str) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
    at = torch.randint(parameter.numel(), (min(n, parameter.numel()),), generator=generator).to(parameter.device)
    values = parameter.flatten()[at].float()
    if adapter is not None and isinstance(adapter, Module):
        for name in adapter.active_adapters:
            values = values + adapter.get_delta_weight(name).flatten()[at].float()  # type: ignore[operator]
    return values.to(torch.bfloat16).cpu()
