"""What adding vectors at a site does on given answers, pair by pair: KL to the aligned model, and the preference margin."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analysis.checkpoints import Checkpoints
from analysis.probe_pairs import ProbePair
from tiltmeter.batch import PreferenceBatch, collate_pairs
from tiltmeter.cpu_linear import fast_linear, linear
from tiltmeter.layers import unembedding
from tiltmeter.log_probs import scale_and_cap, sequence_log_probs, target_hidden_states
from tiltmeter.recovery import RecoveryMoments
from tiltmeter.sweeping import steered_logits

_TOKENS_PER_BATCH = 2048
"""Of rows × tokens before they are multiplied by the number of vectors."""


class Sums(NamedTuple):
    """Of every test pair, in float64: sums over the tokens of its chosen response, and of both."""

    n_tokens: Float[Tensor, " pair"]
    kl_start: Float[Tensor, " pair"]
    """KL(aligned ‖ base), nats."""
    kl: Float[Tensor, "vector pair"]
    """KL(aligned ‖ steered base), nats."""
    margin_change: Float[Tensor, "vector pair"]
    """Of log π(chosen) − log π(rejected), nats."""


class _Laid(NamedTuple):
    """Pairs laid out, with what the aligned model says of them."""

    batch: PreferenceBatch
    aligned: Float[Tensor, "target d_model"]
    """The aligned model's states in front of its unembedding."""
    pairs: Int[Tensor, " target"]
    """Which pair each target is of."""
    is_chosen: Bool[Tensor, " target"]
    moved: Bool[Tensor, "row token"]
    """Tokens whose states are moved: those that a token of a response is predicted from."""


class TestPairs:
    """Pairs on which the base, with vectors added, is compared with the aligned model.

    Args:
        checkpoints: the two models.
        pairs: not those that vectors were estimated on.
    """

    __test__ = False  # no test, whatever its name makes pytest think

    def __init__(self, checkpoints: Checkpoints, pairs: Sequence[ProbePair]) -> None:
        self.base, self.aligned = checkpoints.base.model, checkpoints.aligned.model
        self.groups = [pair.group for pair in pairs]
        with fast_linear(self.aligned):
            self._laid = [self._lay(pairs, rows) for rows in _batches(pairs)]

    @torch.no_grad()
    def aligned_change(self) -> float:
        """By how many nats the aligned model's margin exceeds the base's, on average over pairs."""
        total = 0.0
        for laid in self._laid:
            policy, base = (sequence_log_probs(model, laid.batch).double() for model in (self.aligned, self.base))
            chosen, rejected = (policy - base).chunk(2)
            total += float((chosen - rejected).sum())
        return total / len(self.groups)

    @torch.no_grad()
    def measure(self, site: str, vectors: Float[Tensor, "vector d_model"]) -> Sums:
        """With each vector added at a site of the base, at every token that a response's token is predicted from."""
        shifts = torch.cat([torch.zeros_like(vectors[:1]), vectors])
        moments = RecoveryMoments([1.0] * len(vectors), n_rows=len(self.groups))
        margins = torch.zeros(len(shifts), len(self.groups), dtype=torch.float64)
        head = unembedding(self.aligned)
        for batch, aligned, pairs, is_chosen, moved in self._laid:
            for logits, targets in steered_logits(self.base, batch, site=site, shifts=shifts, tokens=moved):
                ids = batch.target_ids[targets].expand(len(shifts), -1)
                log_probs = logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)
                signed = torch.where(is_chosen[targets], log_probs, -log_probs)
                margins.index_add_(1, pairs[targets].cpu(), signed.double().cpu())
                chosen = targets[is_chosen[targets]]
                goal = scale_and_cap(linear(aligned[chosen], head.weight, head.bias), head)
                start, *steered = logits[:, is_chosen[targets]]
                moments.update(goal, start, steered, pairs[chosen])
        sums = moments.row_sums()
        return Sums(sums.n_tokens, sums.kl_start, sums.kl_steered, margins[1:] - margins[0])

    @torch.no_grad()
    def _lay(self, pairs: Sequence[ProbePair], rows: list[int]) -> _Laid:
        batch = collate_pairs([pairs[row].ids for row in rows], pair_index=rows, layout="concatenated")
        batch = batch.to(self.base.device)
        moved = torch.zeros_like(batch.segments, dtype=torch.bool)
        moved.view(-1)[batch.target_rows] = True
        of = batch.pair_index.repeat(2)[batch.target_sequences]
        return _Laid(
            batch, target_hidden_states(self.aligned, batch), of, batch.target_sequences < batch.n_pairs, moved
        )


def _batches(pairs: Sequence[ProbePair]) -> Iterator[list[int]]:
    """Pairs of similar length, as many as fit, at least one."""
    lengths = [len(p.ids.prompt_ids) + max(len(p.ids.chosen_ids), len(p.ids.rejected_ids)) for p in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)
    while order:
        n = max(1, _TOKENS_PER_BATCH // (2 * lengths[order[-1]]))
        order, rows = order[:-n], order[-n:]
        yield rows
