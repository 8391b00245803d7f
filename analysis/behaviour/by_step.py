"""Scores of the model while it trained, by every scorer that was asked: curves over steps, and the table of start and end."""

import math
from functools import partial
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from analysis.behaviour.words import (
    MEASURES,
    VS_CHOSEN,
    WIN_RATES,
    Measure,
    Point,
    agreement_with,
    before,
    change,
    check_table,
    has,
    headlines_of,
    interval_of,
    is_count,
    last_point,
    measure_of,
    measures_of,
    name_of,
    reading_of,
    rows_of,
    scores_section,
    side_of,
    why_no_number,
)
from analysis.open.runs import Run
from analysis.report.page import Section
from analysis.report.site_axes import Panel, as_text, draw_over_steps
from analysis.report.style import COLOURS, EndLabel, label_ends, mark_level
from tiltmeter.errors import UserError
from tiltmeter.models.generation import Decoding
from tiltmeter.scoring.behaviour import FIGURES, SAMPLES, read_table
from tiltmeter.scoring.scorer import AGREEMENT

NAME = "behaviour_by_step"
NOT_SCORED = (
    "the run has no scores of generated text (expected a run trained with callbacks=standard, behaviour or full); "
    "analysis=behaviour scores its models now"
)
_GENERATED_BY = "callbacks.behaviour.generation_metrics.GenerationMetrics"
_MOST_UNKNOWN = 3
"""Panels for figures that are not among those that lead."""
_LEAST_HEIGHT = 0.1
"""Least height of an axis that begins at 0, so that curves at 0 don't lie in the middle."""


class ScoresByStep(NamedTuple):
    """Scores of generated text by step, from a run's own tables."""

    figures: pd.DataFrame
    n_prompts: int | None
    """Prompts that were completed; None: not known."""
    decoding: Decoding | None
    """Decoding of the completions; None: not known."""


def scores_by_step(run: Run) -> ScoresByStep | None:
    """Read the scores of a run by step; None for a run that scored nothing.

    Raises:
        UserError: a table is damaged; names the file.
    """
    tables = run.folder / "report" / "tables"
    figures = check_table(read_table(tables / FIGURES), tables / FIGURES)
    if figures.empty:
        return None
    samples = read_table(tables / SAMPLES)
    n_prompts = samples["pair_id"].nunique() if "pair_id" in samples else None
    return ScoresByStep(figures, n_prompts, decoding_of(run))


def behaviour_by_step_section(scores: ScoresByStep) -> Section:
    """The section ``behaviour_by_step``."""
    table = scores.figures
    figure, sentences = draw_over_steps(_panels(table), table, panel_height_cm=4.6)
    return scores_section(
        table,
        "policy",
        name=NAME,
        question="What does the model say while it trains, and how is it scored?",
        sentences=sentences,
        figure=figure,
        numbers=table,
        reading=reading_of(table, n_prompts=scores.n_prompts, decoding=scores.decoding),
        headlines=headlines_of(table, f"{NAME}.csv"),
        caption="Every figure as last taken; the interval is the policy’s, that of the two together or the judge’s",
    )


def _panels(table: pd.DataFrame) -> list[Panel]:
    panels: list[Panel] = [partial(draw_win_rate, metric=m) for m in WIN_RATES if has(table, m, "both")]
    panels += [partial(draw_measure, measure=measure) for measure in measures_of(table)]
    others = [m for m in dict.fromkeys(table["metric"]) if not is_count(m)][:_MOST_UNKNOWN]
    return panels or [partial(draw_measure, measure=measure_of(m)) for m in others]


def draw_win_rate(axes: Axes, table: pd.DataFrame, *, metric: str) -> str:
    """Over the base, and over the data set's chosen responses, beside the judge's agreement with labels; ½ is chance."""
    mark_level(axes, 0.5)
    axes.set_ylim(0, 1)
    labels = [_curve(axes, table, metric, "both", COLOURS["policy"], "vs base")]
    if has(table, f"{metric}{VS_CHOSEN}", "both"):
        labels.append(_curve(axes, table, f"{metric}{VS_CHOSEN}", "both", COLOURS["chosen"], "vs chosen"))
    if has(table, AGREEMENT):
        labels.append(_curve(axes, table, AGREEMENT, "judge", COLOURS["mark"], "agreement"))
    axes.set_ylabel("win rate")
    label_ends(axes, [label for label in labels if math.isfinite(label.y)])
    last = last_point(table, metric, "both")
    who = WIN_RATES[metric]
    if not math.isfinite(last.value):
        return f"The policy’s win rate over its base by {who} {why_no_number(last)}"
    return (
        f"By {who} the policy’s win rate over its base is {as_text(last.value, 'percent')}{interval_of(last, 'percent')}"
        f"{_when(last, table)}{agreement_with(table, metric)}"
    )


def draw_measure(axes: Axes, table: pd.DataFrame, *, measure: Measure) -> str:
    """A figure of the policy, or of the two together, over steps, beside the base model's."""
    metric, of = measure.metric, side_of(table, measure.metric)
    labels = [
        _curve(axes, table, metric, "base", COLOURS["base"], "base"),
        _curve(axes, table, metric, of, COLOURS["policy"], "policy" if of == "policy" else ""),
    ]
    if measure in MEASURES:
        axes.set_ylim(0, max(axes.get_ylim()[1], _LEAST_HEIGHT))
    axes.set_ylabel(name_of(measure.metric))
    label_ends(axes, [label for label in labels if math.isfinite(label.y)])
    last = last_point(table, metric, of)
    return change(measure, before(table, metric), last, _when(last, table)) + agreement_with(table, metric)


def _when(last: Point, table: pd.DataFrame) -> str:
    """Step of a figure in words, where it is not the last one."""
    return f" after step {last.steps_taken:.0f}" if last.steps_taken < table["steps_taken"].max() else ""


def _curve(axes: Axes, table: pd.DataFrame, metric: str, of: str, colour: str, name: str) -> EndLabel:
    rows = rows_of(table, metric, of).dropna(subset="value")
    rows = rows[rows["value"].abs() < math.inf]
    if rows.empty:
        return EndLabel(math.nan, name, colour)
    axes.plot(rows["steps_taken"], rows["value"], color=colour, marker="o", markersize=2.5)
    band = rows[(rows["ci_low"].abs() < math.inf) & (rows["ci_high"].abs() < math.inf)]
    axes.fill_between(
        band["steps_taken"], band["ci_low"], band["ci_high"], color=colour, alpha=0.15, linewidth=0, zorder=0
    )
    return EndLabel(float(rows["value"].iloc[-1]), name, colour)


def decoding_of(run: Run) -> Decoding | None:
    """The run's way to draw its completions; None where its configuration doesn't say.

    Raises:
        UserError: values that no run has; names the file.
    """
    for name in run.node("callbacks"):
        here = f"callbacks.{name}"
        if run.setting(f"{here}._target_") == _GENERATED_BY:
            known = {key: value for key, value in run.node(f"{here}.decoding").items() if key != "_target_"}
            try:
                return Decoding(**known)
            except (TypeError, UserError) as error:
                raise UserError(
                    f"{run.folder / 'config.yaml'}: {here}.decoding: {error}; restore the run's own file"
                ) from error
    return None
