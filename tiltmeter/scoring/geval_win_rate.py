"""How often a judge prefers the policy's reply: to the base model's, and to the preferred one of the data."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from tiltmeter.errors import UserError
from tiltmeter.judges.answers import LOW_MASS, checked_prefix, missing_figures, warn_of_missing
from tiltmeter.judges.judge import Judge
from tiltmeter.judges.local_judge import LocalJudge
from tiltmeter.judges.prompts import digest, resolve_criteria
from tiltmeter.models.generation import Completion
from tiltmeter.scoring.pairwise import PRESETS, Comparison, Verdict, VerdictMode, compare
from tiltmeter.scoring.scorer import MAX_MISSING_SHARE, Sample, Scores, Side, mean_figure
from tiltmeter.scoring.win_rate import win_rate_figures

Opponent = Literal["base", "chosen"]


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
            raise UserError(f"win_rate.preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        if verdict_mode not in PRESETS[preset].modes:
            modes = " or ".join(PRESETS[preset].modes)
            raise UserError(f"win_rate.verdict_mode: preset {preset} needs {modes}, got {verdict_mode!r}")
        self.against = (against,) if isinstance(against, str) else tuple(against)
        if not self.against or sorted(set(self.against) & set(get_args(Opponent))) != sorted(self.against):
            raise UserError(
                f"win_rate.against: expected {' or '.join(get_args(Opponent))} or both, got {list(self.against)}"
            )
        criteria = resolve_criteria("win_rate.criterion", criterion)
        if len(criteria) != 1:
            raise UserError(
                f"win_rate.criterion: expected one criterion, got {', '.join(criteria)}; use a scorer for each"
            )
        if not 0 <= max_missing_rate <= 1:
            raise UserError(f"win_rate.max_missing_rate: expected a share from 0 to 1, got {max_missing_rate}")
        self.judge, self.prefix = judge, checked_prefix("win_rate.prefix", prefix)
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
        scores = Scores()
        has_chosen = any(sample.chosen.strip() for sample in samples)
        for opponent in (o for o in self.against if o != "chosen" or has_chosen):
            comparisons = [
                Comparison(
                    f"{s.pair_id}/{s.index}", s.prompt, s.policy.text, s.chosen if opponent == "chosen" else s.base.text
                )
                for s in samples
            ]
            verdicts = compare(
                self.judge,
                comparisons,
                preset=self.preset,
                mode=self.verdict_mode,
                criterion=self.criterion,
                meaning=self.meaning,
                seed=self.seed,
            )
            self._report("" if opponent == "base" else f"_vs_{opponent}", samples, comparisons, verdicts, scores)
        replies: dict[Side, list[Completion]] = {
            "policy": [s.policy for s in samples],
            "base": [s.base for s in samples],
        }
        for side, said in replies.items():
            empty = [float(reply.is_empty) for reply in said]
            scores.figures.append(
                mean_figure(
                    f"{self.prefix}_empty", side, empty, samples, scorer="no text but white space", is_share=True
                )
            )
        return scores

    def _report(
        self,
        suffix: str,
        samples: Sequence[Sample],
        comparisons: Sequence[Comparison],
        verdicts: Sequence[Verdict],
        scores: Scores,
    ) -> None:
        """Add the figures and columns of one opponent."""
        name, limit = f"{self.prefix}_win_rate{suffix}", self.max_missing_rate
        values = [verdict.value for verdict in verdicts]
        longer = [len(c.candidate) - len(c.opponent) for c in comparisons]
        groups = [sample.group for sample in samples]
        failed = [verdict.failed for verdict in verdicts]
        warn_of_missing(name, [why for why in failed if why], len(failed), limit)
        scores.figures.extend(win_rate_figures(name, values, groups, longer, scorer=self.name, max_missing=limit))
        scores.figures.extend(missing_figures(name, "both", [why and why[0] for why in failed], scorer=self.name))

        def share(figure: str, of: Sequence[tuple[float, Sample]], *, max_missing: float) -> None:
            shares, whose = [value for value, _ in of], [sample for _, sample in of]
            scores.figures.append(
                mean_figure(figure, "both", shares, whose, scorer=self.name, is_share=True, max_missing=max_missing)
            )

        pairs = list(zip(verdicts, samples, strict=True))
        asked = [(verdict, sample) for verdict, sample in pairs if verdict.judgements]
        answers = [(judgement, sample) for verdict, sample in asked for judgement in verdict.judgements]
        decisive = [(found.prefers_first, sample) for found, sample in answers if not math.isnan(found.prefers_first)]
        low = [(float(found.mass < LOW_MASS), sample) for found, sample in answers if not found.failure]
        share(
            f"{self.prefix}_position_consistency{suffix}",
            [(verdict.is_consistent, s) for verdict, s in asked],
            max_missing=limit,
        )
        share(f"{self.prefix}_first_position_rate{suffix}", decisive, max_missing=1.0)
        share(f"{name}_low_mass", low, max_missing=1.0)
        share(f"{name}_identical", [(float(not verdict.judgements), s) for verdict, s in pairs], max_missing=1.0)
        consistent = [verdict.is_consistent for verdict in verdicts]
        scores.columns.update({f"{self.prefix}_win{suffix}": values, f"{self.prefix}_consistent{suffix}": consistent})
