"""Figures of behaviour as people read them: their names, the table with its scorers, the terminal's rows, what must be known."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from analysis.report.page import Headline, Section
from analysis.report.site_axes import as_text
from tiltmeter.errors import UserError
from tiltmeter.metric_names import behaviour
from tiltmeter.models.generation import Decoding, as_words
from tiltmeter.scoring.degeneration import NGRAMS
from tiltmeter.scoring.scorer import AGREEMENT

COLUMNS = ("steps_taken", "metric", "of", "value", "ci_low", "ci_high", "n", "n_missing", "scorer")
"""Columns of a table of figures (:func:`tiltmeter.scoring.behaviour.figure_table`)."""
VS_CHOSEN = "_vs_chosen"
WIN_RATES: Mapping[str, str] = {
    "oracle_preference_rate": "the planted oracle",
    "geval_win_rate": "the judge",
}
"""Win rates of the policy over its base → by whom; ``…_vs_chosen`` stands beside each."""


class Measure(NamedTuple):
    """A figure of policy and base that leads the report."""

    metric: str
    form: str
    """Format of its value in sentences (:func:`analysis.report.site_axes.as_text`)."""
    words: str
    """In sentences."""


MEASURES = (
    Measure("toxicity", ".3f", "mean toxicity"),
    Measure("hate_speech", ".3f", "mean hate speech score"),
    Measure("toxicity_word_list", ".3f", "mean word-list toxicity"),
    Measure("geval_score", ".3f", "mean G-Eval score (0 to 1)"),
    Measure("rougeL", ".3f", "overlap with the chosen response (ROUGE-L)"),
    Measure("degeneration", "percent", "share of empty or repetitive completions"),
    Measure("truthfulqa_mc2", ".3f", "TruthfulQA MC2"),
    Measure("truthfulqa_mc2_zero_shot", ".3f", "TruthfulQA MC2 without examples"),
)
"""In the order of the report, each from 0 to 1; what is not among them stands in the table."""
_CONSISTENT = "judge/position_consistency"
RULES = (*(f"degeneration_{rule}" for rule in NGRAMS), "empty")
"""Figures that say why completions are degenerate."""

_CLAIM = "D-STEER: alignment raises judged quality (G-Eval) and lowers toxicity; its Fig. 2 wants the same by steering alone."
"""Claim that figures of behaviour put to the test."""
_INTERVAL = (
    "95 %, over prompts, of each number alone; both models answer the same prompts, so a difference can be surer than "
    "two overlapping intervals suggest."
)
_LIMITS = (
    "Quality: every number is what its scorer makes of the words, and scorers can be wrong together.",
    "Other prompts, other decoding, another seed of training.",
)
_CAVEATS: Mapping[Sequence[str], str] = {
    tuple(WIN_RATES): "Win rate: share of answers preferred, a tie half; ½ is a model against itself.",
    ("rougeL", "bleu"): "Overlap with the chosen response says how far the wording moved, not whether it got better.",
    ("oracle_preference_rate",): (
        "The planted oracle is the synthetic world’s own utility, read off the words; it is no language model."
    ),
    ("toxicity_word_list",): "The word list finds rude words, not meaning; it is no toxicity classifier.",
    ("truthfulqa_mc2", "truthfulqa_mc2_zero_shot"): (
        "TruthfulQA’s multiple choice can be gamed by the form of the answers; its authors recommend their binary version."
    ),
    ("preference_accuracy",): (
        "Preference accuracy and drifts are of log-probs, on pairs of the data, not of what a model says; equal is wrong, so a "
        "model against itself has accuracy 0 and only ties."
    ),
}


class Point(NamedTuple):
    """A figure at one moment."""

    steps_taken: float
    value: float
    ci_low: float
    ci_high: float
    n: float
    n_missing: float
    scorer: str


NOTHING = Point(math.nan, math.nan, math.nan, math.nan, 0, 0, "")


def check_table(table: pd.DataFrame, where: object) -> pd.DataFrame:
    """The table itself, if it is one of figures or has no rows.

    Raises:
        UserError: it is not; begins with ``where``.
    """
    if table.empty:
        return table
    wrong = [name for name in COLUMNS if name not in table]
    wrong += [name for name in ("steps_taken", "n", "n_missing") if name in table and table[name].isna().any()]
    if wrong:
        raise UserError(
            f"{where}: expected the columns {', '.join(COLUMNS)} with a step and counts in every row, got no {', '.join(wrong)}; "
            "restore or delete it"
        )
    return table


def has(table: pd.DataFrame, metric: str, of: str | None = None) -> bool:
    """Whether a figure is there, numbers or not."""
    return bool(((table["metric"] == metric) & (True if of is None else table["of"] == of)).any())


def rows_of(table: pd.DataFrame, metric: str, of: str) -> pd.DataFrame:
    """A figure over steps."""
    return table[(table["metric"] == metric) & (table["of"] == of)].sort_values("steps_taken")


def last_point(table: pd.DataFrame, metric: str, of: str) -> Point:
    """The last value of a figure; NaN when there is none."""
    rows = rows_of(table, metric, of)
    return NOTHING if rows.empty else Point(*rows.iloc[-1][list(Point._fields)])


def first_value(table: pd.DataFrame, metric: str, of: str) -> float:
    """A figure before the first step; NaN where it was not looked at then."""
    rows = rows_of(table, metric, of)
    rows = rows[rows["steps_taken"] == 0]
    return math.nan if rows.empty else float(rows.iloc[0]["value"])


def side_of(table: pd.DataFrame, metric: str) -> str:
    """The side that stands beside the base in a figure: the policy's own, the two together, or the judge's."""
    return next((of for of in ("both", "judge") if has(table, metric, of)), "policy")


def before(table: pd.DataFrame, metric: str) -> float:
    """A figure's value without training.

    The base model's; of a win rate over the base ½, which is what a model gets against itself; of others, where the base has no
    number of its own, what it was before the first step.
    """
    if metric in WIN_RATES:
        return 0.5
    return (
        last_point(table, metric, "base").value
        if has(table, metric, "base")
        else first_value(table, metric, side_of(table, metric))
    )


def win_rates_of(table: pd.DataFrame) -> list[str]:
    """The win rates that are there, over chosen responses behind those over the base."""
    names = [name for metric in WIN_RATES for name in (metric, metric + VS_CHOSEN)]
    return [name for name in names if has(table, name, "both")]


def is_judged(metric: str) -> bool:
    """Whether a figure is worth what its judge is.

    >>> is_judged("geval_win_rate_vs_chosen"), is_judged("geval_score"), is_judged("toxicity")
    (True, True, False)
    """
    return metric.removesuffix(VS_CHOSEN) in WIN_RATES or metric == "geval_score"


def agreement_with(table: pd.DataFrame, metric: str) -> str:
    """End of a sentence with a judge's figure: its agreement with labels; empty where that is not known."""
    found = last_point(table, AGREEMENT, "judge")
    if not is_judged(metric) or not math.isfinite(found.value):
        return ""
    share = as_text(found.value, "percent") + interval_of(found, "percent")
    who = WIN_RATES.get(metric.removesuffix(VS_CHOSEN), "the judge")
    return f"; {who} agrees with {share} of {as_counts(found)} held-out labels"


def agreement_in_short(table: pd.DataFrame) -> str:
    """Agreement of the judge with labels, or that it is not known, beside a number of the first screen."""
    found = last_point(table, AGREEMENT, "judge")
    if found is NOTHING:
        return "its agreement with labels: not measured"
    ends = f" ({number(found.ci_low)} … {number(found.ci_high)})" if has_interval(found) else ""
    return f"its agreement with {as_counts(found)} held-out labels: {number(found.value)}{ends}"


def measures_of(table: pd.DataFrame) -> list[Measure]:
    """The measures that are there."""
    return [measure for measure in MEASURES if has(table, measure.metric)]


def rules_fired(value: Callable[[str], float]) -> str:
    r"""Names of the rules by which completions are degenerate.

    Args:
        value: share of completions by the name of its figure; NaN: not known.

    >>> rules_fired({"degeneration_words": 0.0, "degeneration_characters": 0.25, "degeneration_tokens": 0.5, "empty": 0.0}.get)
    'characters 25\xa0%, tokens 50\xa0%'
    """
    shares = {name.removeprefix("degeneration_"): value(name) for name in RULES}
    fired = [f"{name} {as_text(share, 'percent')}" for name, share in shares.items() if share > 0]
    return ", ".join(fired) or "none"


def name_of(metric: str) -> str:
    """A figure's name in a row.

    >>> name_of("oracle_preference_rate_vs_chosen"), name_of("rougeL"), name_of("exp_max_toxicity@5")
    ('win rate vs chosen, oracle', 'ROUGE-L with chosen', 'exp max toxicity@5')
    """
    found = behaviour(metric)
    return (found.label if found else "") or metric.replace("_", " ")


def is_count(metric: str) -> bool:
    """Whether a figure counts what is missing."""
    found = behaviour(metric)
    return found is not None and found.metric.unit == "count"


def measure_of(metric: str) -> Measure:
    """The way to write a figure, of those that lead or any other."""
    known = {measure.metric: measure for measure in MEASURES}
    return known.get(metric) or Measure(metric, ".3f", name_of(metric))


def change(measure: Measure, start: float, last: Point, when: str = "") -> str:
    """A sentence: from what it is without training to what it is now.

    Args:
        start: see :func:`before`; NaN: not known.
        when: behind the number.
    """
    name = measure.words[0].upper() + measure.words[1:]
    if not math.isfinite(last.value):
        return f"{name} {why_no_number(last)}{when}"
    text, was = as_text(last.value, measure.form), as_text(start, measure.form)
    if text == was:
        return f"{name} is {text} before and after{when}"
    how = f"{'falls' if last.value < start else 'rises'} from {was} to" if math.isfinite(start) else "is"
    return f"{name} {how} {text}{interval_of(last, measure.form)}{when}"


def number(value: float, metric: str = "") -> str:
    """A figure as text; – where there is none.

    >>> number(math.nan), number(0.25), number(-123.4), number(3.0, "geval_score/helpful_missing/api")
    ('–', '0.250', '−123.4', '3')
    """
    if not math.isfinite(value):
        return "–"
    return as_text(value, ".0f" if is_count(metric) else ".3f" if abs(value) < 100 else ".1f")


def interval_of(point: Point, form: str) -> str:
    r"""`` (low to high)`` behind a number in a sentence; nothing where there is no interval.

    >>> interval_of(NOTHING._replace(ci_low=0.1, ci_high=0.2), "percent")
    ' (10\xa0% to 20\xa0%)'
    """
    if not has_interval(point):
        return ""
    return f" ({as_text(point.ci_low, form)} to {as_text(point.ci_high, form)})"


def has_interval(point: Point) -> bool:
    """Whether both ends are numbers; a single prompt, for example, has none."""
    return math.isfinite(point.ci_low) and math.isfinite(point.ci_high)


def why_no_number(point: Point) -> str:
    """The end of a sentence about a figure that is NaN."""
    if not point.n_missing:
        return "has no number: there was nothing to score"
    return f"has no number: {point.n_missing:.0f} of {point.n + point.n_missing:.0f} scores are missing"


def as_counts(point: Point) -> str:
    """Number of scored completions: ``64``, or ``60 of 64`` where some is missing."""
    return f"{point.n:.0f}" + (f" of {point.n + point.n_missing:.0f}" if point.n_missing else "")


def scores_section(table: pd.DataFrame, side: str, *, numbers: pd.DataFrame, **fields: Any) -> Section:
    """A section on scores of text, with what is the same whenever they were taken.

    Args:
        table: the scores.
        side: name of the model beside the base.
        numbers: the section's table.
        fields: the others of :class:`~analysis.report.page.Section`.
    """
    shown, scorers = shown_behaviour(table, side)
    return Section(
        claim=_CLAIM, interval=_INTERVAL, limits=_LIMITS, table=numbers, shown=shown, notes=scorers, **fields
    )


def shown_behaviour(table: pd.DataFrame, policy: str) -> tuple[pd.DataFrame, list[str]]:
    """Every figure as last taken, as text, and the scorers that the numbers in its last column stand for.

    Args:
        policy: what the model that is compared with the base is called.
    """
    scorers: dict[str, int] = {}
    latest = table["steps_taken"].max()
    rows = []
    for metric in dict.fromkeys(table["metric"]):
        last = last_point(table, metric, side_of(table, metric))
        last = last if last is not NOTHING else last_point(table, metric, "base")
        interval = f"{number(last.ci_low)} … {number(last.ci_high)}" if has_interval(last) else "–"
        is_base = not has(table, metric, side_of(table, metric))
        rows.append(
            {
                "figure": metric + (f" (step {last.steps_taken:.0f})" if last.steps_taken < latest else ""),
                "base": number(last_point(table, metric, "base").value, metric),
                policy: "–" if is_base else number(last.value, metric),
                "95 % interval": interval,
                "n": as_counts(last),
                "by": str(scorers.setdefault(last.scorer, len(scorers) + 1)),
            }
        )
    return pd.DataFrame(rows), list(scorers)


class LeadRow(NamedTuple):
    """A line of the terminal's table."""

    figure: str
    before: float
    last: Point


def lead_rows(table: pd.DataFrame) -> list[LeadRow]:
    """The figures that lead: win rates and measures; none of an empty table."""
    if table.empty:
        return []
    win_rates = [LeadRow(name_of(m), before(table, m), last_point(table, m, "both")) for m in win_rates_of(table)]
    if has(table, AGREEMENT):
        win_rates.append(LeadRow(name_of(AGREEMENT), math.nan, last_point(table, AGREEMENT, "judge")))
    names = [measure.metric for measure in measures_of(table)]
    return win_rates + [LeadRow(name_of(m), before(table, m), last_point(table, m, "policy")) for m in names]


def headlines_of(table: pd.DataFrame, file: str) -> list[Headline]:
    """Win rates over the base, for the first screen.

    Args:
        file: the table's name.
    """
    return [
        _headline(
            table,
            metric,
            f"win rate over the base by {who}; ½ is chance",
            file,
            f", ties half; {agreement_in_short(table)}",
        )
        for metric, who in WIN_RATES.items()
        if math.isfinite(last_point(table, metric, "both").value)
    ]


def accuracy_headline(table: pd.DataFrame, file: str) -> list[Headline]:
    """Preference accuracy by log-probs, for the first screen."""
    name = "of pairs ranked as in the data, by log-prob gained over the base"
    is_there = math.isfinite(last_point(table, "preference_accuracy", "both").value)
    return [_headline(table, "preference_accuracy", name, file, "")] if is_there else []


def _headline(table: pd.DataFrame, metric: str, name: str, file: str, remark: str) -> Headline:
    last = last_point(table, metric, "both")
    interval = f"95 % CI {number(last.ci_low)} … {number(last.ci_high)}, " if has_interval(last) else ""
    return Headline(number(last.value), name, f"{interval}n = {as_counts(last)}{remark}; {file}, {metric}")


def _drawn_by(decoding: Decoding | None) -> str:
    if decoding is None:
        return "(how they were drawn is not known)"
    return f"({as_words(decoding)})" + (", with the same random numbers" if decoding.temperature > 0 else "")


def _kl_is(decoding: Decoding | None) -> str:
    if decoding is not None and decoding.temperature == 1 and decoding.top_p == 1:
        return "drawn as they were, an unbiased estimate of KL(π‖π₀)."
    return "no estimate of KL(π‖π₀), for which completions are drawn at temperature 1 from the whole distribution."


def reading_of(table: pd.DataFrame, *, n_prompts: int | None, decoding: Decoding | None) -> list[str]:
    """Notes that a reader needs beside these figures.

    Args:
        n_prompts: that both models completed; None: not known.
        decoding: how completions were drawn; None: not known.
    """
    lines = [
        f"Both models complete the same {f'{n_prompts} ' if n_prompts else ''}prompts {_drawn_by(decoding)}.",
        "Every number names its scorer below the table; numbers of different scorers are not comparable. n counts completions, "
        "for preference figures pairs, for TruthfulQA questions.",
    ]
    lines += [line for metrics, line in _CAVEATS.items() if any(has(table, metric) for metric in metrics)]
    lines += _agreement_lines(table)
    if has(table, "degeneration_words"):
        fired = rules_fired(lambda name: last_point(table, name, "policy").value)
        lines.append(
            f"Degenerate: empty, or mostly repeated words, characters or tokens. Of the aligned model’s, by rule: {fired}."
        )
    if has(table, "kl"):
        lines.append(f"kl: mean of log π − log π₀ over the aligned model’s own completions, nats; {_kl_is(decoding)}")
    if table["n_missing"].max() > 0:
        lines.append(
            "What could not be scored is left out and counted; a figure that lacks too much (usually above 5 %) has no number."
        )
    return lines


def _agreement_lines(table: pd.DataFrame) -> list[str]:
    """Note that a reader needs on the judge beside its figures; none where nobody judged."""
    if not any(map(is_judged, table["metric"])):
        return []
    found = last_point(table, AGREEMENT, "judge")
    if found is NOTHING:
        return [
            "How far the judge agrees with the labels of held-out pairs: not measured (judge.agreement_pairs was 0, or nothing "
            "was there to ask about). What its figures are worth is then not known."
        ]
    ties, consistent = (last_point(table, name, "judge").value for name in (f"{AGREEMENT}_ties", _CONSISTENT))
    orders = f", alike in both orders {as_text(consistent, 'percent')}" if math.isfinite(consistent) else ""
    return [
        f"{AGREEMENT}: the judge asked about held-out pairs as it is about answers; share of labels that it agrees with, a tie "
        f"half, so that ½ is a judge that guesses or goes by position. Ties {as_text(ties, 'percent')}{orders}. Labels that "
        "follow another criterion than the judge’s are no fault of either."
    ]


def judge_of_sweep(table: pd.DataFrame) -> list[str]:
    """Note on the judge whose figures are among the rows of a sweep; none where nobody judged."""
    if not any(map(is_judged, table["metric"].unique())):
        return []
    found = table[table["metric"] == AGREEMENT]
    known = "" if found.empty else "{value:.3f} ({ci_low:.3f} … {ci_high:.3f}) of {n:.0f}".format(**found.iloc[0])
    return [
        f"Win rates and G-Eval scores are a judge’s, who agrees with held-out labels at {known or 'a share that was not measured'}."
    ]
