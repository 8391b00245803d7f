"""Recovery, preference and perplexity on given answers while one vector is added: no judge needed."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analysis.open.laid_pairs import LaidPairs, lay_pairs
from analysis.open.models import LoadedModel
from analysis.open.probe_pairs import ProbePair
from analysis.steering.table import PairRow, Row, Rows, Unit
from tiltmeter.pairs.batch import PreferenceBatch
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.scoring.odds import odds_scores, perplexity_figure
from tiltmeter.stats.jackknife import Interval, jackknife_intervals
from tiltmeter.steering.intervene import Intervention
from tiltmeter.steering.operators import SCALED, SIGNED, Operator, vectors_of
from tiltmeter.steering.recovery import Direction, RecoveryMoments, kl_divergences
from tiltmeter.steering.sweep_logits import (
    SteeredLogits,
    SteeredSums,
    intervened_logits,
    intervened_sums,
    reached_tokens,
    steered_logits,
    steered_sums,
)
from tiltmeter.steering.vector import RANDOM_KINDS, SteeringVector

Tokens = Literal["predicting", "all", "new", "prompt"]
"""Tokens whose hidden states are moved. ``predicting``: those that a token of the response is predicted from, which are the
prompt's last and those after it; ``new``: those after the prompt."""


Moves = Float[Tensor, "shift d_model"] | Sequence[tuple[Tensor, float]]


class Sums(NamedTuple):
    """Sums of every pair under every shift."""

    recovery: RecoveryMoments
    log_probs: Float[Tensor, "shift pair side"]
    kl_from_start: Float[Tensor, "shift pair"]
    first: RecoveryMoments
    """Moments of the first token of each response alone."""

    @property
    def margins(self) -> Float[Tensor, "shift pair"]:
        """log π(chosen) − log π(rejected), nats."""
        return self.log_probs[..., 0] - self.log_probs[..., 1]


class TeacherForcedSweep:
    """One model steered over λ on the answers of pairs, beside the model that it is to become.

    Args:
        start: that is steered.
        goal: that recovery is measured towards.
        pairs: not those that vectors were estimated on.
        direction: interpolation adds λ v, inversion subtracts it.
        strengths: λ, with 0 among them, which is the model as it is.
        tokens: whose hidden states are moved.
        operator: what is done along a vector (:mod:`tiltmeter.steering.operators`).
        means: mean base state of each site, from which ``rotate`` turns towards a vector.
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
        operator: Operator = "add",
        means: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.operator, self.means = operator, means or {}
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
        if self.operator == "add":
            moves: Moves = self.sign * torch.outer(torch.tensor(self.strengths), values)
        else:
            moves = [(values, strength) for strength in self.strengths]
        sums = self.measure(unit.site, moves, self.strengths)
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
        by_pair = (sums.recovery.row_sums().kl_steered, sums.kl_from_start, sums.margins, sums.log_probs[..., 0])
        sums_of_pairs = torch.stack(by_pair, dim=-1)
        return Rows(found, self._pair_rows(unit, 0, self.strengths, self._length(values), sums_of_pairs))

    def _rows_of_draws(self, unit: Unit, values: Float[Tensor, "draw d_model"], strengths: list[float]) -> Rows:
        """Figures of each draw without intervals: what prompts make of a single one is nobody's question."""
        sums = self._run_draws(unit.site, values, strengths)
        n, n_tokens = len(self.groups), sum(self.n_tokens)
        kl, kl_from_start, odds, _, first = sums.unbind(-1)
        start = strengths.index(0.0)
        figures = {
            "recovery": 1 - kl.sum(-1) / kl[0, start].sum(),
            "kl": kl.sum(-1) / n_tokens,
            "recovery_first_token": 1 - first.sum(-1) / first[0, start].sum(),
            "kl_from_start": kl_from_start.sum(-1) / n_tokens,
            "preference_odds": odds.mean(-1),
            "preference_odds_change": (odds - odds[:, start, None]).mean(-1),
        }
        rows, pairs = [], []
        for i in range(len(values)):
            where = unit.direction, unit.vector, i + 1, unit.site
            for j, strength in enumerate(strengths):
                rows += [
                    Row(*where, strength, name, float(figure[i, j]), math.nan, math.nan, n)
                    for name, figure in figures.items()
                ]
            pairs += self._pair_rows(unit, i + 1, strengths, self._length(values[i].double()), sums[i, :, :, :4])
        return Rows(rows, pairs)

    @property
    def sign(self) -> int:
        """Factor that λ is multiplied by: inversion undoes what the operator does, where it can be undone."""
        return -1 if self.direction == "inversion" and self.operator in SIGNED else 1

    def _length(self, values: Float[Tensor, " d_model"]) -> float:
        """‖v‖, or 1 where the operator looks at directions alone."""
        return float(values.norm()) if self.operator in SCALED else 1.0

    def _intervention(
        self, laid: LaidPairs, site: str, values: Float[Tensor, " d_model"], strength: float
    ) -> Intervention | None:
        if not strength:
            return None
        tokens = reached_tokens(laid.batch, laid.predicting if self.tokens == "predicting" else self.tokens)
        along = vectors_of(self.operator, values, self.means.get(site))
        return Intervention(site, along, self.sign * strength, self.operator, tokens)

    def _per_token(self, sums: Sums) -> list[Interval]:
        """KL(unsteered ‖ steered) in nats a token."""
        kl, n_tokens = sums.kl_from_start.T, sums.recovery.row_sums().n_tokens
        return jackknife_intervals(lambda drawn: drawn @ kl / (drawn @ n_tokens)[:, None], self.groups)

    def _changes(self, sums: Sums) -> list[Interval]:
        """PrefOdds less that of λ = 0, in nats: paired, so that what pairs differ by cancels."""
        odds = sums.margins.T
        change = odds - odds[:, self.strengths.index(0.0), None]
        return jackknife_intervals(lambda drawn: drawn @ change / drawn.sum(1, keepdim=True), self.groups)

    def _pair_rows(
        self,
        unit: Unit,
        draw: int,
        strengths: Sequence[float],
        norm: float,
        sums: Float[Tensor, "strength pair 4"],
    ) -> list[PairRow]:
        """Rows of each pair: KL to the goal, KL from the start, preference odds, log π of the chosen response."""
        prompts = [hashlib.sha256(group.encode()).hexdigest()[:12] for group in self.groups]
        return [
            PairRow(
                unit.direction, unit.vector, draw, unit.site, strength, self.sign * strength * norm, *known, *numbers
            )
            for at, strength in enumerate(strengths)
            for known, numbers in zip(
                zip(self.pair_ids, prompts, self.n_tokens, strict=True), sums[at].tolist(), strict=True
            )
        ]

    @torch.no_grad()
    def goal_change(self) -> float:
        """Mean over pairs of the goal's margin less the start's, nats."""
        total = 0.0
        for laid in self._laid:
            goal, start = (sequence_log_probs(model, laid.batch).double() for model in (self.goal, self.start))
            chosen, rejected = (goal - start).chunk(2)
            total += float((chosen - rejected).sum())
        return total / len(self.groups)

    @torch.no_grad()
    def _run_draws(
        self, site: str, values: Float[Tensor, "draw d_model"], strengths: Sequence[float]
    ) -> Float[Tensor, "draw strength pair 5"]:
        """KL to the goal, KL from the start, preference odds, log π of the chosen response; KL to the goal at its first token."""
        moving = [x for x in strengths if x]
        sums = torch.zeros(1 + len(values) * len(moving), len(self.groups), 5, dtype=torch.float64)
        for laid in self._laid:
            starts = _starts(laid.batch)
            for part in self._sums_of_draws(laid, site, values, moving):
                is_chosen, of = laid.is_chosen[part.targets], laid.pairs[part.targets].cpu()
                begins = is_chosen & starts[part.targets]
                kl, log_probs = part.kl_from_goal, part.log_probs.where(is_chosen, -part.log_probs)
                of_chosen = (kl, part.kl_from_start, part.log_probs)
                away, moved, said = (one * is_chosen for one in of_chosen)
                by_target = (away, moved, log_probs, said, kl * begins)
                for column, one in enumerate(by_target):
                    sums[..., column].index_add_(1, of, one.cpu())
        steered = sums[1:].unflatten(0, (len(values), len(moving)))
        unsteered, at = sums[:1].expand(len(values), -1, -1)[:, None], list(strengths).index(0.0)
        return torch.cat([steered[:, :at], unsteered, steered[:, at:]], dim=1)

    def _sums_of_draws(
        self, laid: LaidPairs, site: str, values: Float[Tensor, "draw d_model"], moving: list[float]
    ) -> Iterator[SteeredSums]:
        """Numbers a target without steering, then under each draw at each strength."""

        def goal_logits(some: Tensor) -> Tensor:
            return laid.goal_logits(self.goal, some)

        tokens = laid.predicting if self.tokens == "predicting" else self.tokens
        if self.operator == "add":
            steps = self.sign * torch.tensor(moving)
            shifts = torch.cat([torch.zeros_like(values[:1]), (values[:, None] * steps[:, None]).flatten(0, 1)])
            return steered_sums(
                self.start, laid.batch, site=site, shifts=shifts, goal_logits=goal_logits, tokens=tokens
            )
        steered = [self._intervention(laid, site, v, x) for v in values for x in moving]
        return intervened_sums(self.start, laid.batch, [None, *steered], goal_logits)

    def _logits(self, laid: LaidPairs, site: str, moves: "Moves") -> Iterator[SteeredLogits]:
        if isinstance(moves, Tensor):
            tokens = laid.predicting if self.tokens == "predicting" else self.tokens
            return steered_logits(self.start, laid.batch, site=site, shifts=moves, tokens=tokens)
        return intervened_logits(self.start, laid.batch, [self._intervention(laid, site, *move) for move in moves])

    @torch.no_grad()
    def measure(self, site: str, moves: "Moves", strengths: Sequence[float]) -> Sums:
        """Measure the sums of every pair under each move at a site.

        Args:
            moves: shifts, one of them zeros; of an operator that is none, vectors and strengths, one of them 0.
            strengths: what each is called in summaries; 0: the zeros.
        """
        n = len(self.groups)
        whole, first = (RecoveryMoments(strengths, n_rows=n, direction=self.direction) for _ in range(2))
        unsteered = list(strengths).index(0.0)
        sums = torch.zeros(len(moves), 2 * n, dtype=torch.float64)
        moved = torch.zeros(len(moves), n, dtype=torch.float64)
        for laid in self._laid:
            starts = _starts(laid.batch)
            for part in self._logits(laid, site, moves):
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
        return Sums(whole, sums.unflatten(1, (-1, 2)), moved, first)


def _starts(batch: PreferenceBatch) -> Bool[Tensor, " target"]:
    """Mask of the targets that are the first of their response."""
    of = batch.target_sequences
    return torch.cat([torch.ones_like(of[:1], dtype=torch.bool), of[1:] != of[:-1]])
