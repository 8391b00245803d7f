"""Numbers of chosen tokens in every layout, and divergences against a softmax over all words in float64."""

import pytest
import torch
from torch import Tensor

from tests.tiny_models import random_pairs
from tiltmeter.models.layers import Unembedding
from tiltmeter.pairs.batch import Layout, collate_pairs
from tiltmeter.states.chosen_tokens import ChosenTokens, token_divergences

PAIRS = random_pairs(6)
CHOSEN_IDS = torch.tensor([token for pair in PAIRS for token in pair.chosen_ids])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated", "chosen_only"])
def test_every_chosen_token_of_a_real_pair_has_its_number(layout: Layout, packed: bool) -> None:
    tokens = ChosenTokens([len(pair.chosen_ids) for pair in PAIRS])
    found = torch.full((len(tokens),), -1)
    for rows in ([4, 1, 0], [3], [5, 2]):
        batch = collate_pairs(
            [PAIRS[row] for row in [*rows, 1]],  # the last one fills a schedule
            pair_index=[*rows, 1],
            layout=layout,
            weights=[*(1.0 for _ in rows), 0.0],
            packed=packed,
        )
        targets, numbers = tokens.of_batch(batch)
        assert (found[numbers] == -1).all()
        found[numbers] = batch.target_ids[targets]
    assert torch.equal(found, CHOSEN_IDS)
    assert [of.tolist() for of in tokens.by_response(found.double())] == [list(map(float, p.chosen_ids)) for p in PAIRS]


def test_a_batch_of_fillers_has_none() -> None:
    batch = collate_pairs(PAIRS[:1], pair_index=[0], weights=[0.0])
    assert [len(x) for x in ChosenTokens([len(PAIRS[0].chosen_ids)]).of_batch(batch)] == [0, 0]


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, 3.0)])
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_divergences_are_those_of_both_softmaxes(scale: float, cap: float | None, chunk: int | None) -> None:
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    heads = [Unembedding(some(50, 8), some(50), scale, cap) for _ in range(2)]
    states = [some(11, 8) for _ in range(2)]
    logits = [(h @ head.weight.T + head.bias) * scale for h, head in zip(states, heads, strict=True)]
    if cap:
        logits = [cap * torch.tanh(x / cap) for x in logits]
    p, q = (x.softmax(-1) for x in logits)
    found = token_divergences(states[0], heads[0], states[1], heads[1], chunk_tokens=chunk)
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1), rtol=1e-10, atol=1e-12)
    same = token_divergences(states[0], heads[0], states[0], heads[0], chunk_tokens=chunk)
    assert not same.any()
