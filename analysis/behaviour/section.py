"""The report's section about two checkpoints that were asked again: win rates, base beside aligned, and every figure."""

import math
from collections.abc import Callable, Sequence
from textwrap import fill
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from analysis.behaviour.asked import Answers
from analysis.behaviour.reading import CLAIM, INTERVAL, LIMITS, reading_of
from analysis.behaviour.words import (
    MEASURES,
    VS_CHOSEN,
    WIN_RATES,
    Point,
    accuracy_headline,
    change,
    has,
    has_interval,
    headlines_of,
    interval_of,
    last_point,
    measure_of,
    name_of,
    shown_behaviour,
    why_no_number,
    win_rates_of,
)
from analysis.report.page import Section
from analysis.report.site_axes import as_text
from analysis.report.style import COLOURS, house_style, new_figure, set_titles
from tiltmeter.scoring.behaviour import figure_table, sample_table

NAME = "behaviour"
_ACCURACY = "preference_accuracy"
_FROM_0_TO_1 = ("exp_max_", "geval_score/", "preference_probe_accuracy/", "toxicity_probability@")
"""Beginnings of further figures that have a base's beside them and can't leave 0 … 1."""
_NOT_A_SHARE = "_std@"
_MOST_ROWS = 12
_ROW_CM, _AROUND_CM = 0.62, 2.6
_LABEL_CHARACTERS = 22
Panel = Callable[[Axes, pd.DataFrame, Sequence[str]], str]


def behaviour_section(answers: Answers) -> Section:
    """The section ``behaviour``."""
    table = figure_table(0, 0, answers.scores.figures)
    figure, sentences = _draw(table)
    shown, scorers = shown_behaviour(table, "aligned")
    samples = sample_table(0, 0, answers.samples, answers.scores.columns)
    when = ["steps_taken", "epoch"]
    return Section(
        name=NAME,
        question="How do base and aligned model answer, and how is it scored?",
        claim=CLAIM,
        sentences=sentences,
        interval=INTERVAL,
        limits=LIMITS,
        figure=figure,
        table=table.drop(columns=when),
        reading=_reading(answers, table),
        headlines=headlines_of(table, f"{NAME}.csv") or accuracy_headline(table, f"{NAME}.csv"),
        shown=shown,
        caption="Every figure; the interval is the aligned model’s, or that of the two together",
        notes=scorers,
        more_tables={"behaviour_samples": samples.drop(columns=when)},
    )


def _reading(answers: Answers, table: pd.DataFrame) -> list[str]:
    n_prompts = len({sample.pair_id for sample in answers.samples})
    lines = reading_of(table, n_prompts=n_prompts, decoding=answers.decoding)
    lines.append(f"reward_margin: β (Δ log π of chosen − of rejected) with β = {answers.beta:g}, which only scales it.")
    if table["metric"].str.startswith("preference_probe_").any():
        lines.append(
            "preference_probe_accuracy: a linear probe on hidden states of pairs that it has not seen; …_null: with labels "
            "flipped at random, and where 95 % of the flips lie. High for the base too: the preference could be read before."
        )
    if answers.silent:
        lines.append(
            f"No figure from {', '.join(answers.silent)}: nothing to score, or a failure that the terminal names."
        )
    return lines


def _draw(table: pd.DataFrame) -> tuple[Picture, list[str]]:
    named = dict.fromkeys([*(measure.metric for measure in MEASURES), *table["metric"]])
    sides = [metric for metric in named if _is_share_of_both(table, metric)][:_MOST_ROWS]
    panels: list[tuple[Panel, list[str]]] = [(draw_win_rates, [*win_rates_of(table), _ACCURACY])]
    panels += [(draw_sides, sides)] if sides else []
    heights = [_AROUND_CM + _ROW_CM * len(metrics) for _, metrics in panels]
    with house_style():
        figure, axes = new_figure(len(panels), panel_height_cm=sum(heights) / len(heights))
        axes[0].get_gridspec().set_height_ratios(heights)  # type: ignore[union-attr]
        sentences = [draw(panel, table, metrics) for panel, (draw, metrics) in zip(axes, panels, strict=True)]
        set_titles(figure, axes, sentences)
    return figure, sentences


def draw_win_rates(axes: Axes, table: pd.DataFrame, metrics: Sequence[str]) -> str:
    """Win rates of the aligned model and the share of pairs that it ranks rightly; ½ is chance in all of them."""
    axes.axvline(0.5, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for y, metric in enumerate(metrics):
        colour = COLOURS["chosen" if metric.endswith(VS_CHOSEN) else "policy"]
        _dot(axes, y, last_point(table, metric, "both"), colour)
    _name_rows(axes, metrics)
    axes.set_xlabel("share, 95 % interval; dashed: chance")
    first = last_point(table, metrics[0], "both")
    name = name_of(metrics[0]).capitalize()
    if metrics[0] in WIN_RATES:
        name = f"By {WIN_RATES[metrics[0]]} the aligned model’s win rate over its base"
    if not math.isfinite(first.value):
        return f"{name} {why_no_number(first)}"
    return f"{name} is {as_text(first.value, 'percent')}{interval_of(first, 'percent')}"


def draw_sides(axes: Axes, table: pd.DataFrame, metrics: Sequence[str]) -> str:
    """Base (ring) beside aligned (dot), a row a figure."""
    for y, metric in enumerate(metrics):
        base, policy = last_point(table, metric, "base"), last_point(table, metric, "policy")
        axes.plot([base.value, policy.value], [y, y], color=COLOURS["null"], linewidth=1, zorder=1)
        _dot(axes, y, policy, COLOURS["policy"], label="aligned, 95 % interval" if y == 0 else "")
        ring: dict[str, Any] = {
            "marker": "o",
            "markersize": 6.5,
            "markerfacecolor": "none",
            "markeredgecolor": COLOURS["base"],
        }
        axes.plot([base.value], [y], linestyle="", label="base" if y == 0 else "", **ring)
    _name_rows(axes, metrics)
    axes.legend(loc="upper right", bbox_to_anchor=(1.02, -0.9 / len(metrics)), ncols=2, frameon=False, fontsize=6.5)
    base, policy = (last_point(table, metrics[0], of) for of in ("base", "policy"))
    return change(measure_of(metrics[0]), base.value, policy)


def _dot(axes: Axes, y: int, point: Point, colour: str, *, label: str = "") -> None:
    if has_interval(point):
        axes.plot([point.ci_low, point.ci_high], [y, y], color=colour)
    axes.plot([point.value], [y], marker="o", color=colour, linestyle="", label=label)


def _name_rows(axes: Axes, metrics: Sequence[str]) -> None:
    names = [fill(name_of(m), _LABEL_CHARACTERS) for m in metrics]
    axes.set_yticks(range(len(metrics)), names)
    axes.set_ylim(len(metrics) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    axes.grid(visible=False)
    axes.grid(axis="x")


def _is_share_of_both(table: pd.DataFrame, metric: str) -> bool:
    known = metric in {measure.metric for measure in MEASURES} or (
        metric.startswith(_FROM_0_TO_1) and _NOT_A_SHARE not in metric
    )
    return known and has(table, metric, "base") and has(table, metric, "policy")
