"""How training went: loss, held-out preference accuracy and implicit rewards over the optimizer steps of one run."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.training_notes import (
    claim_of,
    interval_note,
    loss_unit,
    noise_note,
    reading_of_training,
    starts_at_ln_2,
)
from analysis.open.runs import Run
from analysis.report.page import Headline, Section
from analysis.report.style import COLOURS, EndLabel, house_style, label_ends, mark_level, new_figure, set_titles
from tiltmeter.errors import UserError
from tiltmeter.metric_names import metric

METRICS = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
}
"""Name in metrics.csv behind ``train/`` and ``val/`` → column of the table."""
_FEWEST_TO_SMOOTH = 10
_MARK = COLOURS["mark"]
Panel = Callable[[Axes, pd.DataFrame], str]
"""Draws one panel from the table and returns its message."""


def training_section(run: Run) -> Section:
    """The section ``training`` of the report.

    Raises:
        UserError: the run logged no loss.
    """
    table, window = training_table(run)
    panels: list[Panel] = [partial(draw_loss, unit=loss_unit(run, table), mark_ln_2=starts_at_ln_2(run, table))]
    if "accuracy" in table:
        panels += [draw_accuracy, draw_rewards]
    figure, sentences = draw_training(table, panels)
    interval = interval_note(run)
    return Section(
        name="training",
        question="How did training go?",
        claim=claim_of(table),
        sentences=sentences,
        interval=f"Held-out accuracy:{interval}"
        if interval
        else "None: the run kept no held_out.csv to resample prompts of.",
        limits=[
            "That the model is better: a low loss or a high accuracy says that it fits or ranks these pairs as their labels do.",
            "What another seed or order of the data would give.",
        ],
        figure=figure,
        table=table,
        reading=reading_of_training(run, table, window=window),
        headlines=headlines(table, note=interval + noise_note(run)),
    )


def training_table(run: Run) -> tuple[pd.DataFrame, int]:
    """The numbers drawn: one row per split and measurement; and the window of the running mean, in steps.

    ``steps_taken`` is the number of updates that the measured model has had; metrics.csv counts steps from 0 and logs a
    training loss before, a validation after the update of its step.
    """
    parts = []
    for split, shift in (("train", 0), ("val", 1)):
        columns = {metric(split, name): column for name, column in METRICS.items()}
        present = run.metrics[[name for name in columns if name in run.metrics]].dropna(how="all")
        part = present.rename(columns=columns)
        part.insert(0, "steps_taken", run.metrics.loc[part.index, "step"] + shift)
        part.insert(0, "split", split)
        parts.append(part.drop_duplicates("steps_taken", keep="last"))
    if "loss" not in parts[0] or parts[0]["loss"].isna().all():
        raise UserError(f"{run.folder / 'metrics.csv'}: no column train/loss with numbers; this run logged no training")
    n_rows = len(parts[0])
    window = 1 if n_rows < _FEWEST_TO_SMOOTH else max(5, 2 * (n_rows // 40) + 1)
    if "accuracy" in parts[0]:
        parts[0].loc[parts[0]["steps_taken"] == 0, "accuracy"] = math.nan  # policy = base: rounding decides
    for column in [c for c in METRICS.values() if c in parts[0]]:
        mean = parts[0][column].rolling(window, center=True, min_periods=1).mean()
        parts[0][f"{column}_smoothed"] = mean.where(parts[0][column].notna())
    return pd.concat(parts, ignore_index=True), window


def draw_training(table: pd.DataFrame, panels: Sequence[Panel]) -> tuple[Figure, list[str]]:
    """Draw the panels below each other; returns the figure and each panel's message."""
    sentences = []
    with house_style():
        figure, axes = new_figure(len(panels))
        for panel, draw in zip(axes, panels, strict=True):
            panel.set_xlim(0, max(1.0, float(table["steps_taken"].max())))
            sentences.append(draw(panel, table))
        axes[-1].set_xlabel("optimizer steps taken")
        set_titles(figure, axes, sentences)
    return figure, sentences


def draw_loss(axes: Axes, table: pd.DataFrame, *, unit: str, mark_ln_2: bool) -> str:
    """Panel (a): loss; ln 2 nats is what a policy equal to its reference has."""
    colour = COLOURS["policy"]
    labels = _curves(axes, table, "loss", colour, name="train", raw=True)
    if mark_ln_2:
        mark_level(axes, math.log(2))
        labels.append(EndLabel(math.log(2), "ln 2", _MARK))
    axes.set_ylabel(unit)
    label_ends(axes, labels)
    ends = _ends(table, "loss")
    if mark_ln_2:
        verb = "falls" if ends.last < math.log(2) else "rises"
        return f"{ends.split} loss {verb} from ln 2 = 0.693 to {ends.last:.3f} in {ends.steps} steps"
    if ends.first_steps == ends.steps:
        return f"{ends.split} loss is {ends.last:.3f} after {ends.steps} steps"
    verb = "falls" if ends.last < ends.first else "rises"
    return (
        f"{ends.split} loss {verb} from {ends.first:.3f} at {ends.first_steps} to {ends.last:.3f} at {ends.steps} steps"
    )


def draw_accuracy(axes: Axes, table: pd.DataFrame) -> str:
    """Panel (b): share of pairs whose chosen response has the higher implicit reward."""
    mark_level(axes, 0.5)
    labels = _curves(axes, table, "accuracy", COLOURS["policy"], name="train", faint=True)
    axes.set_ylim(axes.get_ylim()[0] - 0.02, 1.02)
    axes.set_ylabel("preference accuracy")
    label_ends(axes, [*labels, EndLabel(0.5, "chance", _MARK)])
    ends, best = _ends(table, "accuracy"), _best(table, "accuracy")
    if best is not None and best[1] > ends.last + 0.005:
        return f"{ends.split} accuracy peaks at {best[1]:.3f} ({best[0]} steps) and ends at {ends.last:.3f}"
    return f"{ends.split} accuracy is {ends.last:.3f} after {ends.steps} steps"


def draw_rewards(axes: Axes, table: pd.DataFrame) -> str:
    """Panel (c): β · log(π/π₀) of the chosen and of the rejected responses."""
    mark_level(axes, 0.0)
    labels = [EndLabel(0.0, "base", _MARK)]
    for side in ("chosen", "rejected"):
        _curves(axes, table, f"reward_{side}", COLOURS[side], name=None)
        labels.append(EndLabel(_ends(table, f"reward_{side}").last, side, COLOURS[side]))
    axes.set_ylabel("implicit reward (β · nats)")
    label_ends(axes, labels)
    chosen, rejected = labels[1].y, labels[2].y
    split = _ends(table, "reward_chosen").split
    return (
        f"{split} reward margin is {_signed(chosen - rejected)}: chosen {_signed(chosen)}, rejected {_signed(rejected)}"
    )


def headlines(table: pd.DataFrame, *, note: str = "") -> list[Headline]:
    """The few numbers for the first screen, each with where it stands in the table; ``note`` is on the accuracy."""
    found = []
    for column, name, form in (
        ("accuracy", "preference accuracy", "{:.3f}"),
        ("loss", "loss", "{:.3f}"),
        ("reward_margin", "reward margin, chosen − rejected", "{:+.2f}"),
    ):
        if column == "reward_margin" and "reward_chosen" in table:
            table = table.assign(reward_margin=table["reward_chosen"] - table["reward_rejected"])
        if column in table:
            ends = _ends(table, column)
            text = form.format(ends.last).replace("-", "−")
            source = "reward_chosen − reward_rejected" if column == "reward_margin" else column
            remark = note if column == "accuracy" else ""
            found.append(
                Headline(text, f"{ends.split.lower()} {name}", f"after {ends.steps} steps; column {source}.{remark}")
            )
    return found


def _curves(
    axes: Axes,
    table: pd.DataFrame,
    column: str,
    colour: str,
    *,
    name: str | None,
    raw: bool = False,
    faint: bool = False,
) -> list[EndLabel]:
    """Training line and held-out points; returns their labels (none without a name for the line)."""
    train, val = _of(table, "train", column), _of(table, "val", column)
    smoothed = _of(table, "train", f"{column}_smoothed")
    alpha = 0.45 if faint else 1.0
    if raw or faint:
        axes.plot(train["steps_taken"], train[column], color=colour, alpha=0.25, linewidth=0.7)
    axes.plot(smoothed["steps_taken"], smoothed[f"{column}_smoothed"], color=colour, alpha=alpha)
    if len(val):
        (points,) = axes.plot(val["steps_taken"], val[column], color=colour, zorder=5, marker="o", linewidth=0.7)
        points.set(markeredgecolor="white", markeredgewidth=0.6, clip_on=False)
    if name is None or smoothed.empty:
        return []
    last = float(smoothed[f"{column}_smoothed"].iloc[-1])
    labels = [EndLabel(last, name, _lighter(colour))]
    return labels + ([EndLabel(float(val[column].iloc[-1]), "held-out", colour)] if len(val) else [])


def _of(table: pd.DataFrame, split: str, column: str) -> pd.DataFrame:
    if column not in table:
        return table.iloc[:0].assign(**{column: []})
    finite = table[column].abs() < math.inf
    return table[(table["split"] == split) & finite]


class _Ends(NamedTuple):
    """First and last value of the split that speaks: held-out where there is one, else the training mean."""

    split: str
    first: float
    first_steps: int
    last: float
    steps: int


def _ends(table: pd.DataFrame, column: str) -> _Ends:
    for split, name, suffix in (("val", "Held-out", ""), ("train", "Training", "_smoothed")):
        rows = _of(table, split, column + suffix)
        if len(rows):
            values, at = rows[column + suffix], rows["steps_taken"]
            return _Ends(name, float(values.iloc[0]), int(at.iloc[0]), float(values.iloc[-1]), int(at.iloc[-1]))
    at_end = int(table["steps_taken"].max())
    return _Ends("Training", math.nan, at_end, math.nan, at_end)


def _best(table: pd.DataFrame, column: str) -> tuple[int, float] | None:
    rows = _of(table, "val", column)
    if rows.empty:
        return None
    row = rows.loc[rows[column].idxmax()]
    return int(row["steps_taken"]), float(row[column])


def _lighter(colour: str) -> str:
    """Half-way to white, for what is drawn faint."""
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c + 0.35 * (255 - c)):02x}" for c in channels)


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
