"""Against the steering-vectors package, where its semantics are ours: adding at blocks, teacher-forced, to 1e-5."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from tests.tiny_models import WIDTH, make_model, random_pairs
from tiltmeter.models.layers import layer_site
from tiltmeter.pairs.batch import PreferenceBatch, collate_pairs
from tiltmeter.pairs.log_probs import model_inputs
from tiltmeter.steering.intervene import Intervention, steer
from tiltmeter.steering.sweep_logits import steered_logits

peer = pytest.importorskip(
    "steering_vectors",
    reason="steering-vectors asks for transformers < 5, so that no extra can name it; `make test` puts it into .venv/peers",
)

DEPTH = 3
STRENGTHS = (-2.0, 0.0, 0.7, 3.0)
VECTORS = torch.randn(DEPTH, WIDTH, generator=torch.Generator().manual_seed(0))
FAMILIES = ("llama", "gpt2", "gpt_neox", "mistral")


def make(family: str) -> PreTrainedModel:
    depth = {"n_layer": DEPTH} if family == "gpt2" else {"num_hidden_layers": DEPTH}
    return make_model(family, **depth).eval()


def make_batch() -> PreferenceBatch:
    return collate_pairs(random_pairs(4, seed=1), pair_index=range(4), layout="concatenated")


def target_logits(model: PreTrainedModel, batch: PreferenceBatch) -> Tensor:
    logits: Tensor = model(**model_inputs(model, batch)).logits
    return logits.flatten(0, 1)[batch.target_rows]


@torch.no_grad()
def theirs(model: PreTrainedModel, batch: PreferenceBatch, vectors: dict[int, Tensor], **options: Any) -> Tensor:
    with peer.SteeringVector(vectors).apply(model, **options):
        return target_logits(model, batch)


@pytest.mark.parametrize("layer", range(DEPTH))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_is_their_loop_over_strengths(family: str, layer: int) -> None:
    model, batch, v = make(family), make_batch(), VECTORS[layer]
    expected = torch.stack([theirs(model, batch, {layer: v}, multiplier=x) for x in STRENGTHS])
    shifts = torch.outer(torch.tensor(STRENGTHS), v)
    ours = torch.cat([x.logits for x in steered_logits(model, batch, site=layer_site(layer), shifts=shifts)], dim=1)
    assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert float((expected[-1] - expected[1]).abs().max()) > 0.1, "steering had no effect"


@torch.no_grad()
def test_a_hook_is_theirs_for_several_layers_and_for_masked_tokens() -> None:
    model, batch = make("llama"), make_batch()
    mask = torch.rand(batch.input_ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    cases: list[tuple[Any, dict[str, Any]]] = [
        ("all", {}),
        (mask, {"token_indices": mask.long(), "min_token_index": None}),
    ]
    for tokens, options in cases:
        expected = theirs(model, batch, dict(enumerate(VECTORS)), multiplier=0.7, **options)
        with steer(model, [Intervention(layer_site(i), v[None], 0.7, tokens=tokens) for i, v in enumerate(VECTORS)]):
            ours = target_logits(model, batch)
        assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert float((ours - target_logits(model, batch)).abs().max()) > 0.1, "steering had no effect"
