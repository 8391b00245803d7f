"""One judge, asked everything: pairs that people ranked, G-Eval scores of replies, and which of two replies is better."""

from collections.abc import Mapping, Sequence
from typing import Literal

from tiltmeter.judges.judge import Judge
from tiltmeter.scoring.geval import N_SAMPLES, TEMPERATURE, GEvalScorer, ScoreMode
from tiltmeter.scoring.scorer import AGREEMENT_PAIRS, Agreement, LabelledPair, Sample, Scorer, Scores
from tiltmeter.scoring.win_rate import Opponent, WinRateScorer


class JudgeScorer:
    """:class:`~tiltmeter.scoring.geval.GEvalScorer` and :class:`~tiltmeter.scoring.win_rate.WinRateScorer` by the same judge.

    They share its budget, cache and limits. Before its first score the judge is asked about held-out pairs that people ranked,
    as it is about replies: figures ``judge/…`` (:meth:`~tiltmeter.scoring.win_rate.WinRateScorer.agreement`).

    Args:
        judge: who rates and compares.
        criteria: rated, each; the first one also decides which of two replies is better.
        score_mode: ``logprob``, ``sample`` or ``integer``. Verdicts on two replies are read as probabilities under the first
            and as words under the others, unless the preset has words only.
        against: whom the policy is compared with; empty: nobody.
        preset: how two replies are compared.
        n_samples, temperature, steps_file, evaluation_steps: of the G-Eval scores.
        seed: of the order of questions and the markers around what is judged.
        agreement_pairs: held-out pairs that it is held against people's labels on, two questions each; 0: none.

    Raises:
        UserError: what the two scorers refuse, or a number of pairs below 0.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        criteria: str | Sequence[str] | Mapping[str, str] = "helpfulness",
        score_mode: ScoreMode = "logprob",
        against: Opponent | Sequence[Opponent] = ("base", "chosen"),
        preset: Literal["plain", "hh_dpo"] = "plain",
        n_samples: int = N_SAMPLES,
        temperature: float = TEMPERATURE,
        steps_file: str | None = None,
        evaluation_steps: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        seed: int = 0,
        agreement_pairs: int = AGREEMENT_PAIRS,
    ) -> None:
        self.judge = judge
        self._rated = GEvalScorer(
            judge,
            criteria=criteria,
            score_mode=score_mode,
            n_samples=n_samples,
            temperature=temperature,
            steps_file=steps_file,
            evaluation_steps=evaluation_steps,
            seed=seed,
        )
        first, meaning = next(iter(self._rated.criteria.items()))
        in_words = preset == "hh_dpo" or score_mode != "logprob"
        comparing = WinRateScorer(
            judge,
            against=against or "base",
            preset=preset,
            criterion={first: meaning},
            verdict_mode="text" if in_words else "logprob",
            seed=seed,
        )
        self._compared = comparing if against else None
        self.agreement = Agreement(agreement_pairs, comparing.agreement, comparing.start)
        self.name = self._rated.name
        self.is_slow = self._rated.is_slow

    @property
    def questions_per_sample(self) -> int:
        """Questions that a sample takes: one a criterion and side, one an opponent and order; more only to ask once again."""
        opponents = self._compared.against if self._compared is not None else ()
        return 2 * len(self._rated.criteria) + 2 * len(opponents)

    def use_labels(self, pairs: Sequence[LabelledPair]) -> None:
        """Take held-out pairs that people ranked."""
        self.agreement.use_labels(pairs)

    def start(self) -> None:
        """Check that the judge can do what scores need, which is all that comparisons need. Raises UserError."""
        self._rated.start()

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Hold the judge against people, then let it rate and compare."""
        whole = Scores(self.agreement.figures())
        scorers: list[Scorer] = [self._rated] if self._compared is None else [self._rated, self._compared]
        for found in [scorer.score(samples) for scorer in scorers]:
            whole.figures.extend(found.figures)
            whole.columns.update(found.columns)
        return whole
