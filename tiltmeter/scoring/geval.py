"""G-Eval (Liu et al., arXiv 2303.16634): a judge rates each reply from 1 to 5 by steps that it wrote down once."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, get_args

from tiltmeter.errors import UserError
from tiltmeter.judges.answers import LOW_MASS, Answer, ask_choices, checked_prefix, missing_figures, warn_of_missing
from tiltmeter.judges.evaluation_steps import EvaluationSteps
from tiltmeter.judges.judge import Judge, Question
from tiltmeter.judges.local_judge import LocalJudge
from tiltmeter.judges.prompts import SCORE, resolve_criteria
from tiltmeter.scoring.scorer import MAX_MISSING_SHARE, Sample, Scores, Side, mean_figure

ScoreMode = Literal["logprob", "sample", "integer"]
POINTS = ("1", "2", "3", "4", "5")
N_SAMPLES, TEMPERATURE = 20, 1.0
"""Samples and temperature of the paper, where probabilities could not be had."""
_SIDES: tuple[Side, ...] = ("policy", "base")
_ANSWER_TOKENS = 8
"""Room for a number with a label before it."""


class GEvalScorer:
    """Scores of replies on each criterion, in [0, 1], of policy and base, and their paired difference.

    A score is (s − 1) / 4 with s = Σ p(i)·i / Σ p(i) over i = 1 … 5, the paper's weighted sum on the scale that other G-Eval
    tools report. Where p comes from is the ``score_mode``; it is part of every figure's ``scorer``, and a mode that a judge
    can't serve is an error, never replaced by another:

    ============ ======================================================================================
    ``logprob``  the judge's probabilities at the first answer token
    ``sample``   shares among ``n_samples`` drawn answers; those that can't be read are not counted as anything
    ``integer``  one answer at temperature 0
    ============ ======================================================================================

    Figures: ``geval_score`` of policy and base, the mean over criteria. For each criterion: ``geval_score/<criterion>`` of both;
    ``geval_score_difference/<criterion>``, policy less base on the same prompts; ``geval_low_mass/<criterion>``, share of
    scores for which less than half of the judge's weight fell on a number; ``geval_score/<criterion>_missing/<reason>``,
    counts. Columns: ``geval_score/<criterion>/<side>`` and ``geval_mass/<criterion>/<side>``, Σ p(i).

    Args:
        judge: who rates.
        criteria: a name of :data:`~tiltmeter.judges.prompts.CRITERIA`, several, or names with texts of your own.
        score_mode: see above.
        n_samples: answers a reply, for ``sample``.
        temperature: of these answers.
        steps_file: JSON file that keeps the judge's steps; made by the first run, the same steps in every later one.
        evaluation_steps: steps of your own, a list for one criterion or criterion → list; the judge is then asked for none.
        seed: of the markers around what is rated.
        max_missing_rate: share of missing scores above which a figure is NaN.
        prefix: in place of ``geval`` in all names, so that scorers with several judges or modes stand side by side.

    Raises:
        UserError: an unknown criterion or mode, options that don't fit together, numbers out of range.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        criteria: str | Sequence[str] | Mapping[str, str] = "helpfulness",
        score_mode: ScoreMode = "logprob",
        n_samples: int = N_SAMPLES,
        temperature: float = TEMPERATURE,
        steps_file: str | None = None,
        evaluation_steps: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        seed: int = 0,
        max_missing_rate: float = MAX_MISSING_SHARE,
        prefix: str = "geval",
    ) -> None:
        if score_mode not in get_args(ScoreMode):
            raise UserError(f"geval.score_mode: expected one of {', '.join(get_args(ScoreMode))}, got {score_mode!r}")
        if score_mode != "sample" and (n_samples, temperature) != (N_SAMPLES, TEMPERATURE):
            raise UserError(
                f"geval.n_samples and geval.temperature: only for geval.score_mode=sample, got {score_mode}; leave them out"
            )
        if n_samples < 2 or not 0 < temperature <= 2:
            raise UserError(
                f"geval: expected n_samples of at least 2 and a temperature in (0, 2], got {n_samples} and {temperature}"
            )
        if not 0 <= max_missing_rate <= 1:
            raise UserError(f"geval.max_missing_rate: expected a share from 0 to 1, got {max_missing_rate}")
        self.judge, self.prefix = judge, checked_prefix("geval.prefix", prefix)
        self.criteria = resolve_criteria("geval.criteria", criteria)
        self.score_mode = score_mode
        self.seed = seed
        self.max_missing_rate = max_missing_rate
        self.is_slow = not isinstance(judge, LocalJudge)
        self.steps = EvaluationSteps(judge, self.criteria, file=steps_file, given=evaluation_steps)
        self._decoding = {
            "logprob": {"want_probabilities": True, "choices": POINTS, "max_tokens": 1, "temperature": 1.0},
            "sample": {"n_samples": n_samples, "max_tokens": _ANSWER_TOKENS, "temperature": temperature},
            "integer": {"max_tokens": _ANSWER_TOKENS, "temperature": 0.0},
        }[score_mode]  # at temperature 1 probabilities are the model's own, whether a server takes them before or after
        detail = f" n={n_samples} T={temperature:g}" if score_mode == "sample" else ""
        self.name = f"G-Eval {score_mode}{detail} by {judge.name}, {SCORE.id}, seed {seed}"

    def start(self) -> None:
        """Check the judge, and have the steps written or read.

        Raises:
            UserError: the judge's, or steps of another judge, template or criterion in the file.
        """
        self.judge.start(want_probabilities=self.score_mode == "logprob")
        self.steps.prepare()

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Rate both sides of every sample on every criterion."""
        self.steps.prepare()  # the judge may have been down at the start
        ready = [criterion for criterion in self.criteria if criterion in self.steps.found]
        keys: list[tuple[str, Side, int]] = [
            (criterion, side, i) for i in range(len(samples)) for criterion in ready for side in _SIDES
        ]
        questions = [self._question(samples[i], criterion, side) for criterion, side, i in keys]
        answers = dict(zip(keys, ask_choices(self.judge, questions, POINTS), strict=True))
        scores = Scores()
        for criterion in self.criteria:
            lacking = self.steps.missing.get(criterion, Answer())
            of = {side: [answers.get((criterion, side, i), lacking) for i in range(len(samples))] for side in _SIDES}
            self._report(criterion, of, samples, scores)
        self._report_means(samples, scores)
        return scores

    def _report_means(self, samples: Sequence[Sample], scores: Scores) -> None:
        """Add the mean over criteria of each sample, and its figures."""
        name = f"{self.prefix}_score"
        for side in _SIDES:
            columns = [scores.columns[f"{name}/{criterion}/{side}"] for criterion in self.criteria]
            means = [sum(values) / len(values) for values in zip(*columns, strict=True)]  # NaN if one is missing
            scorer = f"{self.name}, mean of {', '.join(self.criteria)}"
            scores.figures.append(
                mean_figure(name, side, means, samples, scorer=scorer, is_share=True, max_missing=self.max_missing_rate)
            )

    def _question(self, sample: Sample, criterion: str, side: Side) -> Question:
        reply = sample.policy if side == "policy" else sample.base
        messages = SCORE.fill(
            {"criterion": criterion, "meaning": self.criteria[criterion], "steps": self.steps.text(criterion)},
            [("conversation", "conversation", sample.prompt), ("reply", "reply", reply.text)],
            seed=self.seed,
        )
        return Question(messages, SCORE.id, **self._decoding)  # type: ignore[arg-type]

    def _report(
        self, criterion: str, answers: Mapping[Side, Sequence[Answer]], samples: Sequence[Sample], scores: Scores
    ) -> None:
        """Add the figures and columns of one criterion."""
        name, limit = f"{self.prefix}_score/{criterion}", self.max_missing_rate
        scorer = f"{self.name}, {criterion} by steps {self.steps.digest(criterion)}"
        mean = partial(mean_figure, samples=samples, scorer=scorer)
        values = {side: [score_of(answer) for answer in found] for side, found in answers.items()}
        for side, found in answers.items():
            failures = [(answer.failure, answer.reason) for answer in found if answer.failure]
            warn_of_missing(f"{name} of {side}", failures, len(found), limit)
            masses = [math.nan if answer.failure else answer.mass for answer in found]
            low = [mass if math.isnan(mass) else float(mass < LOW_MASS) for mass in masses]
            scores.figures.extend(
                [
                    mean(name, side, values[side], is_share=True, max_missing=limit),
                    mean(f"{self.prefix}_low_mass/{criterion}", side, low, is_share=True, max_missing=1.0),
                    *missing_figures(name, side, [answer.failure for answer in found], scorer=scorer),
                ]
            )
            scores.columns.update({f"{name}/{side}": values[side], f"{self.prefix}_mass/{criterion}/{side}": masses})
        gains = [policy - base for policy, base in zip(values["policy"], values["base"], strict=True)]
        scores.figures.append(mean(f"{self.prefix}_score_difference/{criterion}", "both", gains, max_missing=limit))


def score_of(answer: Answer) -> float:
    """(s − 1) / 4 with s = Σ p(i)·i / Σ p(i) over the points 1 … 5; NaN without an answer.

    >>> score_of(Answer({"4": 0.6, "5": 0.2}))
    0.8125
    """
    if answer.failure:
        return math.nan
    return (sum(int(point) * p for point, p in answer.weights.items()) / answer.mass - 1) / 4
