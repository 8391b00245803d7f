"""What adding vectors at a site does on given answers, pair by pair: KL to the aligned model, and the preference margin."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.open.checkpoints import Checkpoints
from analysis.open.laid_pairs import lay_pairs
from analysis.open.probe_pairs import ProbePair
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.steering.recovery import RecoveryMoments
from tiltmeter.steering.sweep_logits import steered_logits


class Sums(NamedTuple):
    """Of every test pair, in float64: sums over the tokens of its chosen response, and of both."""

    n_tokens: Float[Tensor, " pair"]
    kl_start: Float[Tensor, " pair"]
    """KL(aligned ‖ base), nats."""
    kl: Float[Tensor, "vector pair"]
    """KL(aligned ‖ steered base), nats."""
    margin_change: Float[Tensor, "vector pair"]
    """Of log π(chosen) − log π(rejected), nats."""


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
        self._laid = lay_pairs(pairs, self.aligned, device=self.base.device)

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
        for laid in self._laid:
            for part in steered_logits(self.base, laid.batch, site=site, shifts=shifts, tokens=laid.predicting):
                is_chosen, log_probs = laid.is_chosen[part.targets], part.log_probs(laid.batch)
                signed = torch.where(is_chosen, log_probs, -log_probs)
                margins.index_add_(1, laid.pairs[part.targets].cpu(), signed.double().cpu())
                chosen = part.targets[is_chosen]
                start, *steered = part.logits[:, is_chosen]
                moments.update(laid.goal_logits(self.aligned, chosen), start, steered, laid.pairs[chosen])
        sums = moments.row_sums()
        return Sums(sums.n_tokens, sums.kl_start, sums.kl_steered, margins[1:] - margins[0])
