"""Log-probs of pairs under a model that is open, token by token: two plain rows a pair, those of one length together."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor

from analysis.open.models import LoadedModel
from tiltmeter.models.layers import unembedding
from tiltmeter.pairs.batch import TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import target_hidden_states, token_log_probs

_TOKENS_PER_BATCH = 8192
_MANY_BATCHES = 40
"""From so many on, the time left is shown."""


class SideLogProbs(NamedTuple):
    """log π of each token of both responses, nats."""

    chosen: Float[Tensor, " token"]
    rejected: Float[Tensor, " token"]


@torch.no_grad()
def tokens_of_pairs(opened: LoadedModel, pairs: Sequence[TokenizedPair]) -> list[SideLogProbs]:
    """log π(y_t | x, y_<t) of every token of both responses of every pair, nats, float64 on the CPU."""
    found: dict[int, SideLogProbs] = {}
    batches = list(_batches(pairs))
    quiet = len(batches) < _MANY_BATCHES
    for rows in track(batches, "Reading pairs", console=Console(highlight=False), disable=quiet, transient=True):
        batch = collate_pairs([pairs[row] for row in rows], pair_index=rows, layout="concatenated")
        batch = batch.to(opened.model.device)
        hidden = target_hidden_states(opened.model, batch)
        said = token_log_probs(hidden, unembedding(opened.model), batch.target_ids).double().cpu()
        order = batch.target_sequences.cpu().argsort(stable=True)
        sides = said[order].split(
            [*(len(pairs[r].chosen_ids) for r in rows), *(len(pairs[r].rejected_ids) for r in rows)]
        )
        found |= {row: SideLogProbs(sides[i], sides[len(rows) + i]) for i, row in enumerate(rows)}
    return [found[row] for row in range(len(pairs))]


def sums_of_pairs(said: Sequence[SideLogProbs]) -> Float[Tensor, "pair side"]:
    """log π of chosen and rejected, summed over tokens, nats.

    >>> sums_of_pairs([SideLogProbs(torch.tensor([-1.0, -2.0]), torch.tensor([-4.0]))]).tolist()
    [[-3.0, -4.0]]
    """
    return torch.tensor([[float(side.sum()) for side in pair] for pair in said], dtype=torch.float64).reshape(-1, 2)


def _batches(pairs: Sequence[TokenizedPair]) -> Iterator[list[int]]:
    """Pairs of similar length, the longest first, as many as fit, at least one."""
    lengths = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)
    while order:
        n = max(1, _TOKENS_PER_BATCH // (2 * lengths[order[-1]]))
        order, rows = order[:-n], order[-n:]
        yield rows
