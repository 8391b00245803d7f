"""Pairs laid out for teacher-forced steering, with what the model that steering aims at says of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from analysis.open.pair_log_probs import batches_by_length, longer_row
from analysis.open.probe_pairs import ProbePair
from tiltmeter.models.cpu_linear import fast_linear, linear
from tiltmeter.models.layers import unembedding
from tiltmeter.pairs.batch import PreferenceBatch, collate_pairs
from tiltmeter.pairs.log_probs import scale_and_cap, target_hidden_states

_TOKENS_PER_BATCH = 2048
"""Most rows × tokens before they are multiplied by the number of vectors or λ."""


class LaidPairs(NamedTuple):
    """A batch of pairs and the goal's states in front of its unembedding."""

    batch: PreferenceBatch
    goal: Float[Tensor, "target d_model"]
    pairs: Int[Tensor, " target"]
    """Pair that each target is of, counted in all that were laid out."""
    is_chosen: Bool[Tensor, " target"]
    predicting: Bool[Tensor, "row token"]
    """The tokens that a token of a response is predicted from."""

    def goal_logits(self, goal: PreTrainedModel, targets: Int[Tensor, " some"]) -> Float[Tensor, "some vocab"]:
        """Logits of the goal, the same as before, at some targets."""
        head = unembedding(goal)
        return scale_and_cap(linear(self.goal[targets], head.weight, head.bias), head)


@torch.no_grad()
def lay_pairs(pairs: Sequence[ProbePair], goal: PreTrainedModel, *, device: torch.device) -> list[LaidPairs]:
    """Pairs of similar length beside each other, read once by the goal.

    Args:
        goal: that steering aims at.
        device: where the batches are to be.
    """
    with fast_linear(goal):
        return [
            _lay([pairs[row] for row in rows], rows, goal, device)
            for rows in batches_by_length([longer_row(pair.ids) for pair in pairs], tokens=_TOKENS_PER_BATCH)
        ]


def _lay(pairs: Sequence[ProbePair], rows: list[int], goal: PreTrainedModel, device: torch.device) -> LaidPairs:
    batch = collate_pairs([pair.ids for pair in pairs], pair_index=rows, layout="concatenated").to(device)
    predicting = torch.zeros_like(batch.segments, dtype=torch.bool)
    predicting.view(-1)[batch.target_rows] = True
    of = batch.pair_index.repeat(2)[batch.target_sequences]
    is_chosen = batch.target_sequences < batch.n_pairs
    return LaidPairs(batch, target_hidden_states(goal, batch), of, is_chosen, predicting)
