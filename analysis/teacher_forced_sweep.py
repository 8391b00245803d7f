"""What a model predicts on given answers while one vector is added: recovery, preference and perplexity, without a judge."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analysis.models import LoadedModel
from analysis.probe_pairs import ProbePair
from analysis.sweep_table import PairRow, Row, Rows, Unit
from tiltmeter.batch import PreferenceBatch, collate_pairs
from tiltmeter.bootstrap import Interval, cluster_intervals
from tiltmeter.cpu_linear import linear
from tiltmeter.layers import unembedding
from tiltmeter.log_probs import scale_and_cap, target_hidden_states
from tiltmeter.recovery import Direction, RecoveryMoments, kl_divergences
from tiltmeter.scoring.preference_odds import odds_scores, perplexity_figure
from tiltmeter.sweeping import steered_logits

_TOKENS_PER_BATCH = 2048
"""Of rows × tokens before they are multiplied by the number of λ."""

Tokens = Literal["predicting", "all", "new", "prompt"]
"""Which tokens' hidden states are moved. ``predicting``: those that a token of the response is predicted from, which are the
prompt's last and those after it; ``new``: those after the prompt."""


class _Laid(NamedTuple):
    """Pairs laid out, with what the goal says of them."""

    batch: PreferenceBatch
    goal: Float[Tensor, "target d_model"]
    """The goal's states in front of its unembedding."""
    places: Int[Tensor, " target"]
    """Which pair each target is of."""
    moved: str | Bool[Tensor, "row token"]
    """Which tokens are steered."""


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
        self._laid = [self._lay(pairs, rows) for rows in _batches(pairs)]
        self.n_tokens = [len(pair.ids.chosen_ids) for pair in pairs]

    def rows(self, unit: Unit, values: Float[Tensor, " d_model"]) -> Rows:
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
            where = unit.direction, unit.vector, unit.site, strength
            found += [Row(*where, name, *interval, n) for name, interval, n in named]
        return Rows(found, self._pair_rows(unit, sums))

    def _per_token(self, sums: _Sums) -> list[Interval]:
        """KL(unsteered ‖ steered) in nats a token."""
        kl, n_tokens = sums.kl_from_start.T, sums.recovery.row_sums().n_tokens
        return cluster_intervals(lambda drawn: drawn @ kl / (drawn @ n_tokens)[:, None], self.groups)

    def _changes(self, sums: _Sums) -> list[Interval]:
        """PrefOdds less that of λ = 0, in nats: paired, so that what pairs differ by cancels."""
        odds = (sums.log_probs[..., 0] - sums.log_probs[..., 1]).T
        change = odds - odds[:, self.strengths.index(0.0), None]
        return cluster_intervals(lambda drawn: drawn @ change / drawn.sum(1, keepdim=True), self.groups)

    def _pair_rows(self, unit: Unit, sums: _Sums) -> list[PairRow]:
        by_pair = sums.recovery.row_sums()
        odds = sums.log_probs[..., 0] - sums.log_probs[..., 1]
        prompts = [hashlib.sha256(group.encode()).hexdigest()[:12] for group in self.groups]
        n_tokens = [int(n) for n in by_pair.n_tokens.tolist()]
        where = unit.direction, unit.vector, unit.site
        return [
            PairRow(*where, strength, *known, *numbers)
            for at, strength in enumerate(self.strengths)
            for known, numbers in zip(
                zip(self.pair_ids, prompts, n_tokens, strict=True),
                torch.stack([by_pair.kl_steered[at], sums.kl_from_start[at], odds[at]], dim=1).tolist(),
                strict=True,
            )
        ]

    @torch.no_grad()
    def _run(self, site: str, values: Float[Tensor, " d_model"]) -> _Sums:
        n = len(self.groups)
        whole, first = (RecoveryMoments(self.strengths, n_rows=n, direction=self.direction) for _ in range(2))
        shifts = torch.outer(torch.tensor(self.strengths), values)
        shifts = shifts if self.direction == "interpolation" else -shifts
        unsteered = self.strengths.index(0.0)
        sums = torch.zeros(len(self.strengths), 2 * n, dtype=torch.float64)
        moved = torch.zeros(len(self.strengths), n, dtype=torch.float64)
        head = unembedding(self.goal)
        for batch, goal, places, reached in self._laid:
            starts = _starts(batch)
            for logits, targets in steered_logits(self.start, batch, site=site, shifts=shifts, tokens=reached):
                ids = batch.target_ids[targets].expand(len(shifts), -1)
                log_probs = logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)
                is_rejected = batch.target_sequences[targets] >= batch.n_pairs
                of = places[targets]
                sums.index_add_(1, (2 * of + is_rejected).cpu(), log_probs.cpu().double())
                chosen = targets[~is_rejected]
                aim = scale_and_cap(linear(goal[chosen], head.weight, head.bias), head)
                steered, of = logits[:, ~is_rejected], of[~is_rejected]
                sides = (aim, steered[unsteered])
                policy, base = sides if self.direction == "interpolation" else sides[::-1]
                whole.update(policy, base, steered, of)
                if (begins := starts[chosen]).any():
                    first.update(policy[begins], base[begins], steered[:, begins], of[begins])
                shift = torch.stack([kl_divergences(steered[unsteered], one) for one in steered])
                moved.index_add_(1, of.cpu(), shift.cpu().double())
        return _Sums(whole, sums.unflatten(1, (-1, 2)), moved, first)

    @torch.no_grad()
    def _lay(self, pairs: Sequence[ProbePair], rows: list[int]) -> _Laid:
        ids = [pairs[row].ids for row in rows]
        batch = collate_pairs(ids, pair_index=rows, layout="concatenated").to(self.start.device)
        places = batch.pair_index.repeat(2)[batch.target_sequences]
        moved = _predicting(batch) if self.tokens == "predicting" else self.tokens
        return _Laid(batch, target_hidden_states(self.goal, batch), places, moved)


def _predicting(batch: PreferenceBatch) -> Bool[Tensor, "row token"]:
    """The tokens that a token of a response is predicted from."""
    mask = torch.zeros_like(batch.segments, dtype=torch.bool)
    mask.view(-1)[batch.target_rows] = True
    return mask


def _starts(batch: PreferenceBatch) -> Bool[Tensor, " target"]:
    """Which targets are the first of their response."""
    of = batch.target_sequences
    return torch.cat([torch.ones_like(of[:1], dtype=torch.bool), of[1:] != of[:-1]])


def _batches(pairs: Sequence[ProbePair]) -> Iterator[list[int]]:
    """Pairs of similar length, as many as fit, at least one."""
    lengths = [len(p.ids.prompt_ids) + max(len(p.ids.chosen_ids), len(p.ids.rejected_ids)) for p in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)
    while order:
        n = max(1, _TOKENS_PER_BATCH // (2 * lengths[order[-1]]))
        order, rows = order[:-n], order[-n:]
        yield rows
