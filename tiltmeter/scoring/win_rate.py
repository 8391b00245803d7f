"""Share of replies of the policy that a judge prefers to others, and of people's preferences that it shares.

From one comparison in both orders, over win rates with their intervals, to the scorer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from tiltmeter.errors import UserError, argument
from tiltmeter.judges.answers import LOW_MASS, Answer, ask_choices, checked_prefix, missing_figures, warn_of_missing
from tiltmeter.judges.judge import Failure, Judge, Question
from tiltmeter.judges.local_judge import LocalJudge
from tiltmeter.judges.prompts import COMPARE, COMPARE_HH_DPO, PromptTemplate, digest, resolve_criteria
from tiltmeter.scoring.scorer import (
    AGREEMENT,
    MAX_MISSING_SHARE,
    Figure,
    LabelledPair,
    Sample,
    Scores,
    Side,
    grouped_mean_figure,
    mean_figure,
)
from tiltmeter.stats.equal_length import length_controlled
from tiltmeter.stats.jackknife import NO_INTERVAL, cluster_mean_interval
from tiltmeter.stats.proportions import share_interval

VerdictMode = Literal["logprob", "text"]


@dataclass(frozen=True)
class Preset:
    """A way to ask.

    Args:
        choices: letter → what it is worth to the reply shown first.
        modes: how a verdict can be read; one that comes after a sentence has no probability at the first token.
        max_tokens: room for the answer, where it is words.
    """

    template: PromptTemplate
    choices: dict[str, float]
    modes: tuple[VerdictMode, ...]
    max_tokens: int


PRESETS = {
    "plain": Preset(COMPARE, {"A": 1.0, "B": 0.0, "C": 0.5}, ("logprob", "text"), 8),
    "hh_dpo": Preset(COMPARE_HH_DPO, {"A": 1.0, "B": 0.0}, ("text",), 256),
}
"""``plain``: one letter, with ties. ``hh_dpo``: in the form of the DPO paper (arXiv 2305.18290, App. C.2), first a sentence
that compares, then A or B; our wording."""


class Comparison(NamedTuple):
    """Two replies to one prompt."""

    id: str
    prompt: str
    candidate: str
    opponent: str


class Judgement(NamedTuple):
    """A judge's verdict on a comparison in one order."""

    candidate_is_first: bool
    value: float
    """1 the candidate is better, 0.5 tie, 0 worse, NaN missing."""
    mass: float
    """Weight of all choices together (:class:`~tiltmeter.judges.answers.Answer`)."""
    failure: Failure | None
    reason: str

    @property
    def prefers_first(self) -> float:
        """1 if the reply shown first is better, 0 if the second, NaN for a tie or nothing."""
        return math.nan if self.value not in (0, 1) else float((self.value == 1) == self.candidate_is_first)


class Verdict(NamedTuple):
    """A comparison's outcome."""

    judgements: tuple[Judgement, ...]
    """One for each order; none where both replies are the same, which is a tie that needs no judge."""

    @property
    def value(self) -> float:
        """1 the candidate is better in both orders, 0 worse in both, NaN if either is missing, else 0.5."""
        values = {judgement.value for judgement in self.judgements}
        if any(map(math.isnan, values)):
            return math.nan
        return values.pop() if len(values) == 1 else 0.5

    @property
    def is_consistent(self) -> float:
        """1 if both orders have the same outcome, 0 if not, NaN where one is missing or nothing was asked."""
        if not self.judgements or math.isnan(self.value):
            return math.nan
        return float(self.judgements[0].value == self.judgements[1].value)

    @property
    def failed(self) -> tuple[Failure, str] | None:
        """Why it is missing, of the first order that failed."""
        return next(((found.failure, found.reason) for found in self.judgements if found.failure), None)


def compare(
    judge: Judge,
    comparisons: Sequence[Comparison],
    *,
    preset: Preset,
    mode: VerdictMode,
    criterion: str,
    meaning: str,
    seed: int = 0,
) -> list[Verdict]:
    """Ask about every comparison in both orders; which order is asked first is drawn for each id.

    So a budget that ends midway leaves no more first than second places to the candidate.
    """
    orders: list[tuple[int, bool]] = []
    for i, comparison in enumerate(comparisons):
        if comparison.candidate.strip() != comparison.opponent.strip():
            candidate_is_first = Random(f"{seed} {comparison.id}").random() < 0.5
            orders += [(i, candidate_is_first), (i, not candidate_is_first)]
    trusted = {"criterion": criterion, "meaning": meaning}
    questions = [
        _question(comparisons[i], candidate_is_first, preset, mode, trusted, seed) for i, candidate_is_first in orders
    ]
    answers = ask_choices(judge, questions, tuple(preset.choices))
    judged: dict[int, list[Judgement]] = {i: [] for i in range(len(comparisons))}
    for (i, candidate_is_first), answer in zip(orders, answers, strict=True):
        judged[i].append(_judgement(answer, candidate_is_first, preset))
    return [Verdict(tuple(found)) for found in judged.values()]


def _question(
    comparison: Comparison,
    candidate_is_first: bool,
    preset: Preset,
    mode: VerdictMode,
    trusted: dict[str, str],
    seed: int,
) -> Question:
    replies = (comparison.candidate, comparison.opponent)
    first, second = replies if candidate_is_first else reversed(replies)
    blanks = [
        ("conversation", "conversation", comparison.prompt),
        ("first", "reply A", first),
        ("second", "reply B", second),
    ]
    messages = preset.template.fill(trusted, blanks, seed=seed)
    if mode == "logprob":  # at temperature 1 probabilities are the model's own, whether taken before or after it
        choices = tuple(preset.choices)
        return Question(
            messages, preset.template.id, choices=choices, want_probabilities=True, max_tokens=1, temperature=1.0
        )
    return Question(messages, preset.template.id, max_tokens=preset.max_tokens)


def _judgement(answer: Answer, candidate_is_first: bool, preset: Preset) -> Judgement:
    if answer.failure:
        return Judgement(candidate_is_first, math.nan, math.nan, answer.failure, answer.reason)
    most = max(answer.weights.values())
    worth = {preset.choices[choice] for choice, weight in answer.weights.items() if weight == most}
    to_first = worth.pop() if len(worth) == 1 else 0.5
    return Judgement(candidate_is_first, to_first if candidate_is_first else 1 - to_first, answer.mass, None, "")


_OUTCOMES = {"wins": 1.0, "ties": 0.5, "losses": 0.0}


def win_rate_figures(
    name: str,
    verdicts: Sequence[float],
    clusters: Sequence[str],
    length_differences: Sequence[int] | Sequence[float],
    *,
    scorer: str,
    max_missing: float = MAX_MISSING_SHARE,
) -> list[Figure]:
    """All figures of one comparison, with 95 % intervals over prompts.

    ============================ ====================================================================
    ``<name>``                   (wins + ties / 2) / verdicts
    ``<name>_wins``              share of wins; ``_ties`` and ``_losses`` likewise
    ``<name>_length_controlled`` the win rate between replies of equal length (:func:`length_controlled`)
    ``<name>_length_difference`` mean length of the candidate less that of its opponent, over all pairs
    ============================ ====================================================================

    Args:
        verdicts: 1 the candidate is better, 0.5 tie, 0 worse, NaN missing.
        clusters: prompt of each; verdicts on one prompt are not independent.
        length_differences: candidate less opponent, in any unit.
        max_missing: share of missing verdicts above which figures of verdicts are NaN.

    Raises:
        ValueError: lengths that differ, or a verdict that isn't 1, 0.5, 0 or NaN.

    >>> win_rate_figures("win_rate", [1.0, 1.0, 0.5, 0.0], list("abcd"), [3.0, -2.0, 0.0, 1.0], scorer="coin")[0].value
    0.625
    """
    if not len(verdicts) == len(clusters) == len(length_differences):
        raise ValueError(
            f"expected one cluster and one length difference a verdict, got {len(verdicts)}, {len(clusters)}, "
            f"{len(length_differences)}"
        )
    y = np.asarray(verdicts, dtype=np.float64)
    valid = ~np.isnan(y)
    if not np.isin(y[valid], list(_OUTCOMES.values())).all():
        raise ValueError(f"expected verdicts 1, 0.5, 0 or NaN, got {sorted(set(y[valid].tolist()))}")
    n, n_missing = int(valid.sum()), int((~valid).sum())
    kept = [cluster for cluster, is_valid in zip(clusters, valid, strict=True) if is_valid]
    differences = np.asarray(length_differences, dtype=np.float64)
    enough = n > 0 and n_missing <= max_missing * len(y)
    ends = ("", *(f"_{what}" for what in _OUTCOMES), "_length_controlled")
    found = dict.fromkeys(ends, NO_INTERVAL)
    if enough:
        shares = (y[valid], *((y[valid] == worth) * 1.0 for worth in _OUTCOMES.values()))
        at_equal_length = length_controlled(y[valid].tolist(), kept, differences[valid].tolist())
        intervals = (*(share_interval(values.tolist(), kept) for values in shares), at_equal_length)
        found = dict(zip(ends, intervals, strict=True))
    figures = [Figure(name + end, "both", *interval, n, n_missing, scorer) for end, interval in found.items()]
    longer = cluster_mean_interval(differences.tolist(), clusters) if len(y) else NO_INTERVAL
    return [*figures, Figure(f"{name}_length_difference", "both", *longer, len(y), 0, scorer)]


Opponent = Literal["base", "chosen"]


class _Names(NamedTuple):
    """Names of the figures of one comparison."""

    rate: str
    consistency: str
    first: str


_OF_JUDGE = _Names(AGREEMENT, "judge/position_consistency", "judge/first_position_rate")


def _against(sample: Sample, opponent: Opponent) -> Comparison:
    reply = sample.chosen if opponent == "chosen" else sample.base.text
    return Comparison(f"{sample.pair_id}/{sample.index}", sample.prompt, sample.policy.text, reply)


class WinRateScorer:
    """Win rates of the policy by a judge, each pair judged in both orders.

    Ties are half; answers that contradict each other in the two orders are a tie; a pair with either answer missing is
    missing; equal replies are a tie without a question; an empty reply is judged like any other.

    Figures, of policy and opponent together, with ``_vs_chosen`` behind the name where the opponent is the data's preferred
    response: those of :func:`~tiltmeter.scoring.win_rate.win_rate_figures` as ``geval_win_rate``, lengths in characters;
    ``geval_position_consistency``, share of judged pairs with the same outcome in both orders; ``geval_first_position_rate``,
    share of decisive answers for the reply shown first; ``geval_win_rate_identical``, share of pairs with equal
    replies; ``geval_win_rate_low_mass``, share of answers with less than half of the judge's weight on a choice;
    ``geval_win_rate_missing/<reason>``, counts. Without a suffix: ``geval_empty``, of policy and base, share of empty
    replies. Columns: ``geval_win`` (1, 0.5, 0) and ``geval_consistent``.

    Args:
        judge: who compares.
        against: whom the policy is compared with.
        preset: ``plain`` (one letter, ties allowed) or ``hh_dpo`` (a sentence first, no ties).
        criterion: a name of :data:`~tiltmeter.judges.prompts.CRITERIA`, or one name with a text of your own.
        verdict_mode: ``logprob`` takes the likeliest letter at the first token, ``text`` the letter on the last line.
        seed: of the order in which the two orders are asked, and of the markers around what is judged.
        max_missing_rate: share of missing verdicts above which a figure is NaN.
        prefix: in place of ``geval`` in all names, so that scorers of several criteria or judges stand side by side.

    Raises:
        UserError: an unknown opponent, preset, criterion or mode, or options that don't fit together.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        against: Opponent | Sequence[Opponent] = ("base", "chosen"),
        preset: Literal["plain", "hh_dpo"] = "plain",
        criterion: str | Mapping[str, str] = "helpfulness",
        verdict_mode: VerdictMode = "logprob",
        seed: int = 0,
        max_missing_rate: float = MAX_MISSING_SHARE,
        prefix: str = "geval",
    ) -> None:
        if preset not in PRESETS:
            raise UserError(f"{argument('WinRateScorer.preset')}: expected one of {', '.join(PRESETS)}, got {preset!r}")
        if verdict_mode not in PRESETS[preset].modes:
            modes = " or ".join(PRESETS[preset].modes)
            raise UserError(
                f"{argument('WinRateScorer.verdict_mode')}: preset {preset} needs {modes}, got {verdict_mode!r}"
            )
        self.against = (against,) if isinstance(against, str) else tuple(against)
        if not self.against or sorted(set(self.against) & set(get_args(Opponent))) != sorted(self.against):
            raise UserError(
                f"{argument('WinRateScorer.against')}: expected {' or '.join(get_args(Opponent))} or both, got {list(self.against)}"
            )
        criteria = resolve_criteria(argument("WinRateScorer.criterion"), criterion)
        if len(criteria) != 1:
            raise UserError(
                f"{argument('WinRateScorer.criterion')}: expected one criterion, got {', '.join(criteria)}; use a scorer for each"
            )
        if not 0 <= max_missing_rate <= 1:
            raise UserError(
                f"{argument('WinRateScorer.max_missing_rate')}: expected a share from 0 to 1, got {max_missing_rate}"
            )
        self.judge, self.prefix = judge, checked_prefix(argument("WinRateScorer.prefix"), prefix)
        self.preset, self.verdict_mode = PRESETS[preset], verdict_mode
        ((self.criterion, self.meaning),) = criteria.items()
        self.seed = seed
        self.max_missing_rate = max_missing_rate
        self.is_slow = not isinstance(judge, LocalJudge)
        self.name = (
            f"{self.criterion}:{digest(self.meaning)} by {judge.name}, {verdict_mode} in both orders, "
            f"{self.preset.template.id}, seed {seed}"
        )

    def start(self) -> None:
        """Check the judge.

        Raises:
            UserError: the judge's.
        """
        self.judge.start(want_probabilities=self.verdict_mode == "logprob")

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Compare the policy's reply to every sample with each opponent's; without chosen responses, with the base's."""
        scores, prefix = Scores(), self.prefix
        groups = [sample.group for sample in samples]
        has_chosen = any(sample.chosen.strip() for sample in samples)
        for opponent in (o for o in self.against if o != "chosen" or has_chosen):
            end = "" if opponent == "base" else f"_vs_{opponent}"
            ends = ("win_rate", "position_consistency", "first_position_rate")
            names = _Names(*(f"{prefix}_{name}{end}" for name in ends))
            verdicts, figures = self._compare(names, [_against(sample, opponent) for sample in samples], groups)
            scores.figures.extend(figures)
            scores.columns[f"{prefix}_win{end}"] = [verdict.value for verdict in verdicts]
            scores.columns[f"{prefix}_consistent{end}"] = [verdict.is_consistent for verdict in verdicts]
        sides: tuple[Side, ...] = ("policy", "base")
        for side in sides:
            empty = [float(getattr(sample, side).is_empty) for sample in samples]
            scores.figures.append(
                mean_figure(
                    f"{self.prefix}_empty", side, empty, samples, scorer="no text but white space", is_share=True
                )
            )
        return scores

    def agreement(self, pairs: Sequence[LabelledPair]) -> list[Figure]:
        """Agreement with people: the win rate of what they preferred over what they did not, asked and counted like any other.

        Figures, of ``judge``: those of :func:`win_rate_figures` as ``judge/agreement``, ½ for a judge that guesses or goes by
        position alone; ``judge/position_consistency`` and ``judge/first_position_rate``.
        """
        comparisons = [Comparison(pair.pair_id, pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
        _, figures = self._compare(_OF_JUDGE, comparisons, [pair.group for pair in pairs])
        return [figure._replace(of="judge") for figure in figures]

    def _compare(
        self, names: _Names, comparisons: Sequence[Comparison], groups: Sequence[str]
    ) -> tuple[list[Verdict], list[Figure]]:
        """Ask about all, and count."""
        verdicts = compare(
            self.judge,
            comparisons,
            preset=self.preset,
            mode=self.verdict_mode,
            criterion=self.criterion,
            meaning=self.meaning,
            seed=self.seed,
        )
        name, limit = names.rate, self.max_missing_rate
        longer = [len(c.candidate) - len(c.opponent) for c in comparisons]
        failed = [verdict.failed for verdict in verdicts]
        warn_of_missing(name, [why for why in failed if why], len(failed), limit)
        values = [verdict.value for verdict in verdicts]
        figures = win_rate_figures(name, values, groups, longer, scorer=self.name, max_missing=limit)
        figures += missing_figures(name, "both", [why and why[0] for why in failed], scorer=self.name)
        return verdicts, figures + self._shares(names, list(zip(verdicts, groups, strict=True)))

    def _shares(self, names: _Names, verdicts: Sequence[tuple[Verdict, str]]) -> list[Figure]:
        """Figures on how the judge judged, from verdicts with their prompt."""
        asked = [(verdict, group) for verdict, group in verdicts if verdict.judgements]
        answers = [(judgement, group) for verdict, group in asked for judgement in verdict.judgements]
        first = [(found.prefers_first, group) for found, group in answers]
        consistent = [(verdict.is_consistent, group) for verdict, group in asked]
        decisive = [one for one in first if not math.isnan(one[0])]
        low = [(float(found.mass < LOW_MASS), group) for found, group in answers if not found.failure]
        same = [(float(not verdict.judgements), group) for verdict, group in verdicts]

        def share(figure: str, of: Sequence[tuple[float, str]], max_missing: float = 1.0) -> Figure:
            values, groups = [value for value, _ in of], [group for _, group in of]
            how: dict[str, Any] = {"scorer": self.name, "is_share": True, "max_missing": max_missing}
            return grouped_mean_figure(figure, "both", values, groups, **how)

        return [
            share(names.consistency, consistent, self.max_missing_rate),
            share(names.first, decisive),
            share(f"{names.rate}_low_mass", low),
            share(f"{names.rate}_identical", same),
        ]
