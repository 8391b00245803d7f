from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny_models import LAYERS, VOCAB, WIDTH, make_model
from tiltmeter.capture import capture
from tiltmeter.layers import all_sites, backbone, decoder_blocks, final_norm
from tiltmeter.positions import Readings
from tiltmeter.steering import Intervention, steer

SITES = all_sites(LAYERS)
GOLDEN_FAMILIES = ("llama", "gpt2", "gemma2", "cohere")


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


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", GOLDEN_FAMILIES)
def test_adding_shifts_the_site_by_exactly_that_and_nothing_below_it(family: str, site: str) -> None:
    model, ids, v = model_of(family), ids_of(), noise(1, WIDTH)
    before, logits = run(model, ids)
    with steer(model, Intervention(site, v, 0.7)):
        after, steered_logits = run(model, ids)
    depth = SITES.index(site)
    for below in SITES[:depth]:
        assert torch.equal(after[below], before[below])
    assert torch.equal(after[site], before[site] + 0.7 * v)
    for above in SITES[depth + 1 :]:
        assert not torch.equal(after[above], before[above])
    assert not torch.equal(logits, steered_logits)
    _, logits_again = run(model, ids)
    assert torch.equal(logits_again, logits)
    assert n_hooks(model) == 0
