"""What a model predicts on given answers while one vector is added: recovery, preference and perplexity, without a judge."""

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analysis.open.laid_pairs import lay_pairs
from analysis.open.models import LoadedModel
from analysis.open.probe_pairs import ProbePair
from analysis.steering.directions import RANDOM_KINDS
from analysis.steering.table import PairRow, Row, Rows, Unit
from tiltmeter.pairs.batch import PreferenceBatch
from tiltmeter.scoring.odds import odds_scores, perplexity_figure
from tiltmeter.stats.jackknife import Interval, jackknife_intervals
from tiltmeter.steering.recovery import Direction, RecoveryMoments, kl_divergences
from tiltmeter.steering.sweep_logits import steered_logits, steered_sums
from tiltmeter.steering.vector import SteeringVector

Tokens = Literal["predicting", "all", "new", "prompt"]
"""Which tokens' hidden states are moved. ``predicting``: those that a token of the response is predicted from, which are the
prompt's last and those after it; ``new``: those after the prompt."""


class _Sums(NamedTuple):
    """What every pair adds at every λ."""

    recovery: RecoveryMoments
    log_probs: Float[Tensor, "strength pair side"]
    kl_from_start: Float[Tensor, "strength pair"]
    first: RecoveryMoments
    """Of the first token of each response alone."""


class TeacherForcedSweep:
    """One model steered over λ on the answers of pairs, beside the model that it is to become.

    Args:
        start: that is steered.
        goal: that recovery is measured towards.
        pairs: not those that vectors were estimated on.
        direction: interpolation adds λ v, inversion subtracts it.
        strengths: λ, with 0 among them.
        tokens: whose hidden states are moved.
    """

    def __init__(
        self,
        start: LoadedModel,
        goal: LoadedModel,
        pairs: Sequence[ProbePair],
        *,
        direction: Direction,
        strengths: Sequence[float],
        tokens: Tokens = "predicting",
    ) -> None:
        self.start, self.goal = start.model, goal.model
        self.pair_ids, self.groups = [pair.pair_id for pair in pairs], [pair.group for pair in pairs]
        self.direction, self.strengths, self.tokens = direction, list(strengths), tokens
        self._laid = lay_pairs(pairs, self.goal, device=self.start.device)
        self.n_tokens = [len(pair.ids.chosen_ids) for pair in pairs]

    def rows(self, unit: Unit, vectors: Sequence[SteeringVector], strengths: Sequence[float]) -> Rows:
        """All metrics of a unit: of its one vector at every λ of the sweep, or of many draws at some strengths.

        Args:
            vectors: those of the unit.
            strengths: of draws; a single vector takes those of the sweep.
        """
        if unit.vector in RANDOM_KINDS:
            return self._rows_of_draws(unit, torch.stack([v.values for v in vectors]), list(strengths))
        return self._rows_of_one(unit, vectors[0].values)

    def _rows_of_one(self, unit: Unit, values: Float[Tensor, " d_model"]) -> Rows:
        """All metrics at all λ of a vector, with 95 % intervals over prompts, and what each pair adds to them."""
        sums = self._run(unit.site, values)
        reached = sums.recovery.summary(self.groups).steered
        at_first = sums.first.summary(self.groups).steered
        from_start, changes = self._per_token(sums), self._changes(sums)
        found = []
        for at, strength in enumerate(self.strengths):
            chosen, rejected = sums.log_probs[at].T.tolist()
            odds = odds_scores([-x for x in chosen], [-x for x in rejected], groups=self.groups).figures
            figures = [*odds, perplexity_figure(chosen, self.n_tokens, groups=self.groups)]
            named = [(f.name, Interval(f.value, f.low, f.high), f.n) for f in figures]
            n = reached[at].n_rows
            named += [
                (name, interval, n)
                for name, interval in zip(("recovery", "kl", "top1_agreement"), reached[at][1:4], strict=True)
            ]
            named += [("recovery_first_token", at_first[at].recovery, n), ("kl_from_start", from_start[at], n)]
            named += [("preference_odds_change", changes[at], n)]
            where = unit.direction, unit.vector, 0, unit.site, strength
            found += [Row(*where, name, *interval, n) for name, interval, n in named]
        margins = sums.log_probs[..., 0] - sums.log_probs[..., 1]
        sums_of_pairs = torch.stack([sums.recovery.row_sums().kl_steered, sums.kl_from_start, margins], dim=-1)
        return Rows(found, self._pair_rows(unit, 0, self.strengths, float(values.norm()), sums_of_pairs))

    def _rows_of_draws(self, unit: Unit, values: Float[Tensor, "draw d_model"], strengths: list[float]) -> Rows:
        """Figures of each draw without intervals: what prompts make of a single one is nobody's question."""
        sums = self._run_draws(unit.site, values, strengths)
        n, n_tokens = len(self.groups), sum(self.n_tokens)
        kl, kl_from_start, odds, first = sums.unbind(-1)
        start = strengths.index(0.0)
        figures = {
            "recovery": 1 - kl.sum(-1) / kl[0, start].sum(),
            "kl": kl.sum(-1) / n_tokens,
            "recovery_first_token": 1 - first.sum(-1) / first[0, start].sum(),
            "kl_from_start": kl_from_start.sum(-1) / n_tokens,
            "preference_odds": odds.mean(-1),
            "preference_odds_change": (odds - odds[:, start, None]).mean(-1),
        }
        rows, pairs, norms = [], [], values.double().norm(dim=1).tolist()
        for i in range(len(values)):
            where = unit.direction, unit.vector, i + 1, unit.site
            for j, strength in enumerate(strengths):
                rows += [
                    Row(*where, strength, name, float(figure[i, j]), math.nan, math.nan, n)
                    for name, figure in figures.items()
                ]
            pairs += self._pair_rows(unit, i + 1, strengths, norms[i], sums[i, :, :, :3])
        return Rows(rows, pairs)

    def _per_token(self, sums: _Sums) -> list[Interval]:
        """KL(unsteered ‖ steered) in nats a token."""
        kl, n_tokens = sums.kl_from_start.T, sums.recovery.row_sums().n_tokens
        return jackknife_intervals(lambda drawn: drawn @ kl / (drawn @ n_tokens)[:, None], self.groups)

    def _changes(self, sums: _Sums) -> list[Interval]:
        """PrefOdds less that of λ = 0, in nats: paired, so that what pairs differ by cancels."""
        odds = (sums.log_probs[..., 0] - sums.log_probs[..., 1]).T
        change = odds - odds[:, self.strengths.index(0.0), None]
        return jackknife_intervals(lambda drawn: drawn @ change / drawn.sum(1, keepdim=True), self.groups)

    def _pair_rows(
        self,
        unit: Unit,
        draw: int,
        strengths: Sequence[float],
        norm: float,
        sums: Float[Tensor, "strength pair 3"],
    ) -> list[PairRow]:
        """What each pair adds: KL to the goal, KL from the start, preference odds."""
        prompts = [hashlib.sha256(group.encode()).hexdigest()[:12] for group in self.groups]
        sign = 1 if self.direction == "interpolation" else -1
        return [
            PairRow(unit.direction, unit.vector, draw, unit.site, strength, sign * strength * norm, *known, *numbers)
            for at, strength in enumerate(strengths)
            for known, numbers in zip(
                zip(self.pair_ids, prompts, self.n_tokens, strict=True), sums[at].tolist(), strict=True
            )
        ]

    @torch.no_grad()
    def _run_draws(
        self, site: str, values: Float[Tensor, "draw d_model"], strengths: Sequence[float]
    ) -> Float[Tensor, "draw strength pair 4"]:
        """KL to the goal, KL from the start, preference odds, and KL to the goal at the response's first token."""
        moving = torch.tensor([x for x in strengths if x]) * (1 if self.direction == "interpolation" else -1)
        shifts = torch.cat([torch.zeros_like(values[:1]), (values[:, None] * moving[:, None]).flatten(0, 1)])
        sums = torch.zeros(len(shifts), len(self.groups), 4, dtype=torch.float64)
        for laid in self._laid:
            starts = _starts(laid.batch)
            tokens = laid.predicting if self.tokens == "predicting" else self.tokens
            parts = steered_sums(
                self.start,
                laid.batch,
                site=site,
                shifts=shifts,
                goal_logits=lambda some, laid=laid: laid.goal_logits(self.goal, some),  # type: ignore[misc]
                tokens=tokens,
            )
            for part in parts:
                is_chosen, of = laid.is_chosen[part.targets], laid.pairs[part.targets].cpu()
                begins = is_chosen & starts[part.targets]
                kl, log_probs = part.kl_from_goal, part.log_probs.where(is_chosen, -part.log_probs)
                by_target = (kl * is_chosen, part.kl_from_start * is_chosen, log_probs, kl * begins)
                for column, one in enumerate(by_target):
                    sums[..., column].index_add_(1, of, one.cpu())
        steered = sums[1:].unflatten(0, (len(values), len(moving)))
        unsteered, at = sums[:1].expand(len(values), -1, -1)[:, None], list(strengths).index(0.0)
        return torch.cat([steered[:, :at], unsteered, steered[:, at:]], dim=1)

    @torch.no_grad()
    def _run(self, site: str, values: Float[Tensor, " d_model"]) -> _Sums:
        n = len(self.groups)
        whole, first = (RecoveryMoments(self.strengths, n_rows=n, direction=self.direction) for _ in range(2))
        shifts = torch.outer(torch.tensor(self.strengths), values)
        shifts = shifts if self.direction == "interpolation" else -shifts
        unsteered = self.strengths.index(0.0)
        sums = torch.zeros(len(self.strengths), 2 * n, dtype=torch.float64)
        moved = torch.zeros(len(self.strengths), n, dtype=torch.float64)
        for laid in self._laid:
            starts = _starts(laid.batch)
            tokens = laid.predicting if self.tokens == "predicting" else self.tokens
            for part in steered_logits(self.start, laid.batch, site=site, shifts=shifts, tokens=tokens):
                is_chosen, of = laid.is_chosen[part.targets], laid.pairs[part.targets]
                sums.index_add_(1, (2 * of + ~is_chosen).cpu(), part.log_probs(laid.batch).cpu().double())
                chosen = part.targets[is_chosen]
                aim = laid.goal_logits(self.goal, chosen)
                steered, of = part.logits[:, is_chosen], of[is_chosen]
                sides = (aim, steered[unsteered])
                policy, base = sides if self.direction == "interpolation" else sides[::-1]
                whole.update(policy, base, steered, of)
                if (begins := starts[chosen]).any():
                    first.update(policy[begins], base[begins], steered[:, begins], of[begins])
                shift = torch.stack([kl_divergences(steered[unsteered], one) for one in steered])
                moved.index_add_(1, of.cpu(), shift.cpu().double())
        return _Sums(whole, sums.unflatten(1, (-1, 2)), moved, first)


def _starts(batch: PreferenceBatch) -> Bool[Tensor, " target"]:
    """Which targets are the first of their response."""
    of = batch.target_sequences
    return torch.cat([torch.ones_like(of[:1], dtype=torch.bool), of[1:] != of[:-1]])
