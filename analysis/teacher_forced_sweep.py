"""What a model predicts on given answers while one vector is added: recovery, preference and perplexity, without a judge."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis.models import LoadedModel
from analysis.probe_pairs import ProbePair
from analysis.sweep_table import Row, Unit
from tiltmeter.batch import PreferenceBatch, collate_pairs
from tiltmeter.bootstrap import Interval
from tiltmeter.cpu_linear import linear
from tiltmeter.layers import unembedding
from tiltmeter.log_probs import scale_and_cap, target_hidden_states
from tiltmeter.recovery import Direction, RecoveryMoments
from tiltmeter.scoring.preference_odds import odds_scores, perplexity_figure
from tiltmeter.sweeping import steered_logits

_TOKENS_PER_BATCH = 2048
"""Of rows × tokens before they are multiplied by the number of λ."""


class _Laid(NamedTuple):
    """Pairs laid out, with what the goal says of them."""

    batch: PreferenceBatch
    goal: Float[Tensor, "target d_model"]
    """The goal's states in front of its unembedding."""
    places: Int[Tensor, " target"]
    """Which pair each target is of."""


class TeacherForcedSweep:
    """One model steered over λ on the answers of pairs, beside the model that it is to become.

    Args:
        start: that is steered.
        goal: that recovery is measured towards.
        pairs: not those that vectors were estimated on.
        direction: interpolation adds λ v, inversion subtracts it.
        strengths: λ, with 0 among them.
    """

    def __init__(
        self,
        start: LoadedModel,
        goal: LoadedModel,
        pairs: Sequence[ProbePair],
        *,
        direction: Direction,
        strengths: Sequence[float],
    ) -> None:
        self.start, self.goal = start.model, goal.model
        self.groups = [pair.group for pair in pairs]
        self.direction, self.strengths = direction, list(strengths)
        self._laid = [self._lay(pairs, rows) for rows in _batches(pairs)]
        self.n_tokens = [len(pair.ids.chosen_ids) for pair in pairs]

    def rows(self, unit: Unit, values: Float[Tensor, " d_model"]) -> list[Row]:
        """All metrics at all λ of a vector, with 95 % intervals over prompts."""
        recovery, log_probs = self._run(unit.site, values)
        reached = recovery.summary(self.groups).steered
        found = []
        for at, strength in enumerate(self.strengths):
            chosen, rejected = log_probs[at].T.tolist()
            odds = odds_scores([-x for x in chosen], [-x for x in rejected], groups=self.groups).figures
            figures = [*odds, perplexity_figure(chosen, self.n_tokens, groups=self.groups)]
            named = [(f.name, Interval(f.value, f.low, f.high), f.n) for f in figures]
            of_goal = zip(("recovery", "kl", "top1_agreement"), reached[at][1:4], strict=True)
            named += [(name, interval, reached[at].n_rows) for name, interval in of_goal]
            where = unit.direction, unit.vector, unit.site, strength
            found += [Row(*where, name, *interval, n) for name, interval, n in named]
        return found

    @torch.no_grad()
    def _run(
        self, site: str, values: Float[Tensor, " d_model"]
    ) -> tuple[RecoveryMoments, Float[Tensor, "strength pair side"]]:
        moments = RecoveryMoments(self.strengths, n_rows=len(self.groups), direction=self.direction)
        shifts = torch.outer(torch.tensor(self.strengths), values)
        shifts = shifts if self.direction == "interpolation" else -shifts
        unsteered = self.strengths.index(0.0)
        sums = torch.zeros(len(self.strengths), 2 * len(self.groups), dtype=torch.float64)
        head = unembedding(self.goal)
        for batch, goal, places in self._laid:
            for logits, targets in steered_logits(self.start, batch, site=site, shifts=shifts):
                ids = batch.target_ids[targets].expand(len(shifts), -1)
                log_probs = logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)
                is_rejected = batch.target_sequences[targets] >= batch.n_pairs
                of = places[targets]
                sums.index_add_(1, (2 * of + is_rejected).cpu(), log_probs.cpu().double())
                chosen = targets[~is_rejected]
                aim = scale_and_cap(linear(goal[chosen], head.weight, head.bias), head)
                steered = logits[:, ~is_rejected]
                pair = (aim, steered[unsteered])
                policy, base = pair if self.direction == "interpolation" else pair[::-1]
                moments.update(policy, base, steered, of[~is_rejected])
        return moments, sums.unflatten(1, (-1, 2))

    @torch.no_grad()
    def _lay(self, pairs: Sequence[ProbePair], rows: list[int]) -> _Laid:
        ids = [pairs[row].ids for row in rows]
        batch = collate_pairs(ids, pair_index=rows, layout="concatenated").to(self.start.device)
        places = batch.pair_index.repeat(2)[batch.target_sequences]
        return _Laid(batch, target_hidden_states(self.goal, batch), places)


def _batches(pairs: Sequence[ProbePair]) -> Iterator[list[int]]:
    """Pairs of similar length, as many as fit, at least one."""
    lengths = [len(p.ids.prompt_ids) + max(len(p.ids.chosen_ids), len(p.ids.rejected_ids)) for p in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)
    while order:
        n = max(1, _TOKENS_PER_BATCH // (2 * lengths[order[-1]]))
        order, rows = order[:-n], order[-n:]
        yield rows
