"""What tests of steering share: tiny models, prompts of different lengths, and every hidden state of a pass."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny_models import BOS, LAYERS, PAD, VOCAB, WIDTH, make_model
from tiltmeter.models.layers import all_sites, backbone, decoder_blocks, final_norm
from tiltmeter.states.capture import capture
from tiltmeter.states.positions import Readings

SITES = all_sites(LAYERS)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def n_hooks(model: PreTrainedModel) -> int:
    modules = [backbone(model), *decoder_blocks(model), final_norm(model)]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def model_of(family: str, **options: Any) -> PreTrainedModel:
    return make_model(family, torch.float64, "eager" if family == "gemma2" else "sdpa", **options)


def ids_of(rows: int = 3, tokens: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def run(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Hidden states at every site, and the logits."""
    zeros = torch.zeros(ids.numel(), dtype=torch.long)
    wanted = Readings(torch.arange(ids.numel()), None, zeros, zeros, zeros, (ids.shape[0], ids.shape[1]))
    with torch.no_grad(), capture(model, SITES, {"response_all": wanted}) as captured:
        logits = model(input_ids=ids, use_cache=False, **inputs).logits
    return {point.site: rows.reshape(*ids.shape, -1) for point, rows in captured.items()}, logits


STRONG = 4.0


def direction(n: int = 1, *, seed: int = 0) -> Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prompts(lengths: tuple[int, ...] = (6, 3, 5), *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of prompts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.full((len(lengths), max(lengths)), PAD), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        own = slice(max(lengths) - n, None) if left else slice(0, n)
        ids[row, own] = torch.cat([torch.tensor([BOS]), torch.randint(3, VOCAB, (n - 1,), generator=generator)])
        mask[row, own] = 1
    return ids, mask


def states_of(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states after block 0 of every token, padding included."""
    zeros = torch.zeros(ids.numel(), dtype=torch.long)
    every = Readings(torch.arange(ids.numel()), None, zeros, zeros, zeros, (ids.shape[0], ids.shape[1]))
    with torch.no_grad(), capture(model, "layer_00", {"response_all": every}) as captured:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    (rows,) = captured.values()
    return rows.reshape(*ids.shape, -1)
