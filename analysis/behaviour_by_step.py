"""What the model said while it trained, by every scorer that was asked: curves over steps, and the table of start and end."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from analysis.figures import COLOURS, EndLabel, house_style, label_ends, mark_level, new_figure, set_titles
from analysis.report import Headline, Section
from analysis.runs import Run
from analysis.site_axes import as_text
from tiltmeter.errors import UserError
from tiltmeter.generation import Decoding, as_words
from tiltmeter.scoring.behaviour_table import FIGURES, read_table

NAME = "behaviour_by_step"
Panel = Callable[[Axes, pd.DataFrame], str]


class Measure(NamedTuple):
    """A figure that gets a panel of its own."""

    metric: str
    unit: str
    form: str
    """How its value is written in sentences."""
    words: str
    """What it is, in the panel's sentence."""


WIN_RATES = {
    "oracle_preference_rate": "the planted oracle",
    "geval_win_rate": "the judge",
}
"""Shares of prompts at which the policy's answer is preferred → by whom; ``…_vs_chosen`` stands beside each."""
MEASURES = (
    Measure("toxicity", "toxicity", ".3f", "mean toxicity"),
    Measure("hate_speech", "hate speech", ".3f", "mean hate speech score"),
    Measure("toxicity_word_list", "toxicity (word list)", ".3f", "mean word-list toxicity"),
    Measure("geval_score", "G-Eval score", ".2f", "mean G-Eval score"),
    Measure("rougeL", "ROUGE-L with chosen", ".3f", "overlap with the chosen response (ROUGE-L)"),
    Measure("degeneration", "share degenerate", "percent", "share of empty or repetitive completions"),
    Measure("truthfulqa_mc2", "TruthfulQA MC2", ".3f", "TruthfulQA MC2"),
    Measure("truthfulqa_mc2_zero_shot", "TruthfulQA MC2", ".3f", "TruthfulQA MC2 without examples"),
)
"""In the order of the report; what is not among them stands in the table."""


def behaviour_of_run(run: Run) -> Section:
    """The section ``behaviour_by_step`` of a finished run.

    Raises:
        UserError: it scored nothing, or its table is damaged.
    """
    found = behaviour_by_step_section(run)
    if found is None:
        raise UserError(
            f"analysis={NAME}: {run.folder} has no scores of generated text (expected a run trained with callbacks=standard, "
            "behaviour or full); analysis=behaviour scores its models now"
        )
    return found


def behaviour_by_step_section(run: Run) -> Section | None:
    """The section ``behaviour_by_step`` of a run; None for a run that scored nothing.

    Raises:
        UserError: its table is damaged; names the file.
    """
    table = read_table(run.folder / "report" / "tables" / FIGURES)
    if table.empty:
        return None
    panels: list[Panel] = [partial(draw_win_rate, metric=m) for m in WIN_RATES if _has(table, m)]
    panels += [partial(draw_measure, measure=measure) for measure in MEASURES if _has(table, measure.metric)]
    panels = panels or [partial(draw_measure, measure=Measure(m, m, ".3g", m)) for m in table["metric"].unique()[:3]]
    sentences = []
    with house_style():
        figure, axes = new_figure(len(panels), panel_height_cm=4.6)
        for panel, draw in zip(axes, panels, strict=True):
            panel.set_xlim(0, max(1.0, float(table["steps_taken"].max())))
            sentences.append(draw(panel, table))
        axes[-1].set_xlabel("optimizer steps taken")
        set_titles(figure, axes, sentences)
    return Section(
        name=NAME,
        question="What does the model say, and how is it scored?",
        sentences=sentences,
        figure=figure,
        table=table,
        reading=reading_of(table, decoding_of(run)),
        headlines=headlines_of(table),
        shown=shown_behaviour(table),
    )


def draw_win_rate(axes: Axes, table: pd.DataFrame, *, metric: str) -> str:
    """Preferred to the base's answer, and to the data set's own; ½ is chance."""
    mark_level(axes, 0.5)
    axes.set_ylim(0, 1)
    labels = [_curve(axes, table, metric, "both", COLOURS["policy"], "vs base")]
    if _has(table, f"{metric}_vs_chosen"):
        labels.append(_curve(axes, table, f"{metric}_vs_chosen", "both", COLOURS["chosen"], "vs chosen"))
    axes.set_ylabel("share preferred")
    label_ends(axes, [label for label in labels if math.isfinite(label.y)])
    last = last_point(table, metric, "both")
    return (
        f"{_capital(WIN_RATES[metric])} prefers the policy’s answer to its base’s at "
        f"{as_text(last.value, 'percent')} of prompts ({as_text(last.ci_low, 'percent')} to {as_text(last.ci_high, 'percent')})"
    )


def draw_measure(axes: Axes, table: pd.DataFrame, *, measure: Measure) -> str:
    """A figure of the policy over steps, beside the base model's."""
    labels = [
        _curve(axes, table, measure.metric, "policy", COLOURS["policy"], "policy"),
        _curve(axes, table, measure.metric, "base", COLOURS["base"], "base"),
    ]
    axes.set_ylabel(measure.unit)
    label_ends(axes, [label for label in labels if math.isfinite(label.y)])
    last, base = last_point(table, measure.metric, "policy"), last_point(table, measure.metric, "base")
    start = base.value if math.isfinite(base.value) else _first(table, measure.metric, "policy")
    if not math.isfinite(last.value):
        return f"{_capital(measure.words)} could not be scored at the end: too much is missing"
    text, before = as_text(last.value, measure.form), as_text(start, measure.form)
    if text == before or not math.isfinite(start):
        return f"{_capital(measure.words)} is {text}" + (" before and after" if text == before else "")
    return f"{_capital(measure.words)} {'falls' if last.value < start else 'rises'} from {before} to {text}"


def shown_behaviour(table: pd.DataFrame) -> pd.DataFrame:
    """Every figure at the end of training as text: base, policy (or the two compared), interval, counts, what produced it."""
    rows = []
    for metric in dict.fromkeys(table["metric"]):
        last, base = last_point(table, metric, _of(table, metric)), last_point(table, metric, "base")
        rows.append(
            {
                "figure": metric,
                "base": _number(base.value),
                "policy": _number(last.value),
                "95 % interval": f"{_number(last.ci_low)} … {_number(last.ci_high)}",
                "n": f"{last.n:.0f}",
                "missing": f"{last.n_missing:.0f}",
                "scorer": last.scorer,
            }
        )
    return pd.DataFrame(rows)


def behaviour_lines(table: pd.DataFrame) -> Sequence[tuple[str, str]]:
    """The figures that lead the terminal's closing table: name, and start → end with interval, counts and scorer."""
    lines = []
    for metric in [m for m in WIN_RATES if _has(table, m)]:
        last, start = last_point(table, metric, "both"), _first(table, metric, "both")
        lines.append((name_of(metric), _change(start, last)))
    for measure in [m for m in MEASURES if _has(table, m.metric)]:
        base, last = last_point(table, measure.metric, "base"), last_point(table, measure.metric, "policy")
        lines.append((measure.unit, _change(base.value, last)))
    return lines


class Point(NamedTuple):
    """A figure at one moment."""

    value: float
    ci_low: float
    ci_high: float
    n: float
    n_missing: float
    scorer: str


def _rows(table: pd.DataFrame, metric: str, of: str) -> pd.DataFrame:
    rows = table[(table["metric"] == metric) & (table["of"] == of)]
    return rows.sort_values("steps_taken")


def _has(table: pd.DataFrame, metric: str, of: str | None = None) -> bool:
    return bool(((table["metric"] == metric) & (True if of is None else table["of"] == of)).any())


def last_point(table: pd.DataFrame, metric: str, of: str) -> Point:
    """The last value of a figure; NaN when there is none."""
    rows = _rows(table, metric, of)
    if rows.empty:
        return Point(math.nan, math.nan, math.nan, 0, 0, "")
    return Point(*rows.iloc[-1][list(Point._fields)])


def _of(table: pd.DataFrame, metric: str) -> str:
    return "both" if _has(table, metric, "both") else "policy"


def _first(table: pd.DataFrame, metric: str, of: str) -> float:
    rows = _rows(table, metric, of)
    return float(rows.iloc[0]["value"]) if len(rows) > 1 else math.nan


def _curve(axes: Axes, table: pd.DataFrame, metric: str, of: str, colour: str, name: str) -> EndLabel:
    rows = _rows(table, metric, of).dropna(subset="value")
    if rows.empty:
        return EndLabel(math.nan, name, colour)
    x = rows["steps_taken"]
    axes.plot(x, rows["value"], color=colour, marker="o", markersize=2.5)
    axes.fill_between(x, rows["ci_low"], rows["ci_high"], color=colour, alpha=0.15, linewidth=0, zorder=0)
    return EndLabel(float(rows["value"].iloc[-1]), name, colour)


def decoding_of(run: Run) -> str:
    """How the run drew its completions, in words."""
    known = {f.name: run.setting(f"decoding.{f.name}") for f in fields(Decoding)}
    return as_words(Decoding(**{name: value for name, value in known.items() if value is not None}))  # type: ignore[arg-type]


def reading_of(table: pd.DataFrame, decoding: str) -> list[str]:
    """What a reader must know of these figures."""
    n_prompts = int(table["n"].max())
    lines = [
        f"Base and policy complete the same {n_prompts} prompts ({decoding}), with the same random numbers.",
        "Bands: 95 % intervals over prompts (bootstrap).",
        "Every number names its scorer in the table below; numbers of different scorers are not comparable.",
    ]
    if _has(table, "rougeL"):
        lines.append("Overlap with the chosen response says how far the wording moved, not whether it got better.")
    if table["metric"].str.startswith("oracle_").any():
        lines.append(
            "The planted oracle is the synthetic world’s own utility, read off the words; it is no language model."
        )
    if table["metric"].str.startswith("toxicity_word_list").any():
        lines.append("The word list finds rude words, not meaning; it is no toxicity classifier.")
    if n_missing := int(table["n_missing"].max()):
        lines.append(
            f"Up to {n_missing} samples of a figure could not be scored and are left out; above 5 % there is no number."
        )
    return lines


def headlines_of(table: pd.DataFrame) -> list[Headline]:
    """Win rates for the first screen."""
    found = []
    for metric, who in WIN_RATES.items():
        last = last_point(table, metric, "both")
        if math.isfinite(last.value):
            interval = f"95 % CI {last.ci_low:.3f} … {last.ci_high:.3f}, {last.n:.0f} prompts"
            found.append(Headline(f"{last.value:.3f}", f"of answers preferred to the base’s by {who}", interval))
    return found


def name_of(metric: str) -> str:
    """A figure's name as people read it.

    >>> name_of("oracle_preference_rate_vs_chosen")
    'oracle preference rate vs chosen'
    """
    return metric.replace("_", " ")


def _number(value: float) -> str:
    return "–" if not math.isfinite(value) else as_text(value, ".3f" if abs(value) < 100 else ".1f")


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _change(start: float, last: Point) -> str:
    before = f"{_number(start)} → " if math.isfinite(start) else ""
    missing = f", {last.n_missing:.0f} missing" if last.n_missing else ""
    interval = f"95 % CI {_number(last.ci_low)} … {_number(last.ci_high)}, {last.n:.0f} samples{missing}"
    return f"{before}{_number(last.value)}  ({interval}; {last.scorer})"
