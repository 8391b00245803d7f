"""Which of two replies is better: asked in both orders, a tie where the answers contradict each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

from tiltmeter.judges.answers import Answer, ask_choices
from tiltmeter.judges.judge import Failure, Judge, Question
from tiltmeter.judges.prompts import COMPARE, COMPARE_HH_DPO, PromptTemplate

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
    answers = ask_choices(judge, questions, tuple(preset.choices)) if questions else []
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
