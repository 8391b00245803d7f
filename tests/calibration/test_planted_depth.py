"""Depth of a change that was trained to be shallow, and of one that was trained to be deep, in a real pretrained model."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from analysis.open.models import LoadedModel
from analysis.open.pair_log_probs import compare_on_pairs
from datamodules.synthetic import SyntheticWorld
from datamodules.tokenization import PairTokenizer
from tests.stories260k import read_model, read_tokenizer
from tiltmeter.pairs.batch import PreferenceBatch, TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import target_hidden_states
from tiltmeter.scoring.depth import FIRST_TOKENS, first_token_share

pytestmark = pytest.mark.slow
N_TRUNCATED, N_TOKENS, LATE = 3, 40, 20
BETA = 0.1


@pytest.fixture(scope="module")
def base(shared_data: Path) -> LoadedModel:
    folder = shared_data / "models" / "stories260K"
    return LoadedModel(read_model(folder / "stories260K.bin").eval(), read_tokenizer(folder / "tok512.bin"))


@pytest.fixture(scope="module")
def pairs(base: LoadedModel) -> list[TokenizedPair]:
    _, ids, _ = PairTokenizer(base.tokenizer, 480)(SyntheticWorld(n_prompts=184).load()[0])
    return [TokenizedPair(p.prompt_ids, p.chosen_ids[:N_TOKENS], p.rejected_ids[:N_TOKENS]) for p in ids]


def batches(pairs: Sequence[TokenizedPair]) -> Iterator[tuple[PreferenceBatch, Tensor]]:
    """Batches of 16, and the place of each target in its response."""
    for start in range(0, len(pairs), 16):
        part = pairs[start : start + 16]
        batch = collate_pairs(part, pair_index=range(len(part)), layout="concatenated")
        lengths = [*(len(pair.chosen_ids) for pair in part), *(len(pair.rejected_ids) for pair in part)]
        place = torch.empty(len(batch.target_ids), dtype=torch.long)
        place[batch.target_sequences.argsort(stable=True)] = torch.cat([torch.arange(n) for n in lengths])
        yield batch, place


def trained(base: LoadedModel, pairs: Sequence[TokenizedPair], *, first: int, end: int, n_epochs: int) -> LoadedModel:
    """DPO on tokens ``first`` to ``end`` of the responses; all others, but for those between, are held where they were.

    Training on truncated responses alone leaves nothing to keep later tokens, and they move as well (share .23 here).
    """
    torch.manual_seed(0)
    model = copy.deepcopy(base.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)

    def log_probs(of: torch.nn.Module, batch: PreferenceBatch) -> Tensor:
        said: Tensor = of.lm_head(target_hidden_states(of, batch))  # type: ignore[arg-type, operator]
        return said.log_softmax(-1)

    with torch.no_grad():
        steps = [(batch, place, log_probs(base.model, batch)) for batch, place in batches(pairs)]
    for _ in range(n_epochs):
        for batch, place, start in steps:
            own = log_probs(model, batch)
            change = (own - start).gather(1, batch.target_ids[:, None])[:, 0]
            asked = (place >= first) & (place < end)
            held = place >= FIRST_TOKENS if first == 0 else place < FIRST_TOKENS
            by_response = torch.zeros(batch.n_pairs * 2).index_add(0, batch.target_sequences[asked], change[asked])
            margin = by_response[: batch.n_pairs] - by_response[batch.n_pairs :]
            kept = (start.exp() * (start - own)).sum(-1)[held].mean()
            optimizer.zero_grad()
            (kept - F.logsigmoid(BETA * margin).mean()).backward()
            optimizer.step()
    return LoadedModel(model.eval(), base.tokenizer)


def share(base: LoadedModel, aligned: LoadedModel, pairs: Sequence[TokenizedPair]) -> float:
    """Share of the divergence in the first tokens of held-out chosen responses."""
    compared = compare_on_pairs(base, aligned, pairs, move=torch.zeros(base.model.config.hidden_size))
    return first_token_share([pair.chosen.kl for pair in compared], [str(i) for i in range(len(pairs))]).value


def test_a_change_of_the_first_three_tokens_is_shallow(base: LoadedModel, pairs: list[TokenizedPair]) -> None:
    aligned = trained(base, pairs[:136], first=0, end=N_TRUNCATED, n_epochs=8)
    assert share(base, aligned, pairs[136:]) >= 0.8


def test_a_change_of_late_tokens_is_not(base: LoadedModel, pairs: list[TokenizedPair]) -> None:
    aligned = trained(base, pairs[:64], first=LATE, end=N_TOKENS, n_epochs=2)
    assert share(base, aligned, pairs[136:]) <= 0.1
