"""The course of training: loss, held-out preference accuracy and implicit rewards over the optimizer steps of one run."""

import inspect
import math
from functools import partial
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from analysis.open.runs import Run
from analysis.report.page import Headline, Section
from analysis.report.site_axes import Panel, draw_over_steps
from analysis.report.style import COLOURS, EndLabel, label_ends, mark_level
from datamodules.synthetic import SyntheticWorld
from tiltmeter.errors import UserError
from tiltmeter.metric_names import metric
from tiltmeter.stats.proportions import share_interval

METRICS = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
}
"""Name in metrics.csv behind ``train/`` and ``val/`` → column of the table."""
_STARTS_AT_LN_2 = ("sigmoid", "robust")
"""Losses that are ln 2 nats for a policy equal to its reference."""
_WITHOUT_UNIT = ("hinge", "ipo")
_FEWEST_TO_SMOOTH = 10
_DPO_CLAIM = "DPO (Rafailov et al. 2023): the policy learns to rank responses as their labels do, also on prompts not trained on."
_SFT_CLAIM = "None of the papers’: supervised training lowers the loss, also on prompts that it was not done on."
_MARK = COLOURS["mark"]


class Training(NamedTuple):
    """A run's log of its training, and what must be known to read it."""

    table: pd.DataFrame
    """A row for each split and measurement.

    ``steps_taken`` is the number of updates that the measured model has had; metrics.csv counts steps from 0 and logs a training
    loss before, a validation after the update of its step.
    """
    window: int
    """Width of the running mean, in steps."""
    loss: str
    interval: str = ""
    """95 % interval over prompts of the last held-out accuracy; empty for runs without held_out.csv."""
    noise: str = ""
    """Planted label noise, which caps the accuracy on training pairs."""

    @property
    def is_of_pairs(self) -> bool:
        """Whether preferences were trained; else chosen responses alone."""
        return "accuracy" in self.table


def training_section(training: Training) -> Section:
    """The section ``training`` of the report."""
    table, interval = training.table, training.interval
    marks_ln_2 = training.is_of_pairs and training.loss in _STARTS_AT_LN_2
    unit = "nats" if training.loss not in _WITHOUT_UNIT else training.loss
    label = f"loss ({unit})" if training.is_of_pairs else "loss (nats per token)"
    panels: list[Panel] = [partial(draw_loss, unit=label, mark_ln_2=marks_ln_2)]
    if training.is_of_pairs:
        panels += [draw_accuracy, draw_rewards]
    figure, sentences = draw_over_steps(panels, table)
    return Section(
        name="training",
        question="How did training go?",
        claim=_DPO_CLAIM if training.is_of_pairs else _SFT_CLAIM,
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
        reading=_reading(training),
        headlines=headlines(table, note=interval + training.noise),
    )


def training_table(run: Run) -> Training:
    """The numbers drawn.

    Raises:
        UserError: the run logged no loss.
    """
    train, val = _logged(run, "train", 0), _logged(run, "val", 1)
    if "loss" not in train or train["loss"].isna().all():
        raise UserError(f"{run.folder / 'metrics.csv'}: no column train/loss with numbers; this run logged no training")
    window = 1 if len(train) < _FEWEST_TO_SMOOTH else max(5, 2 * (len(train) // 40) + 1)
    if "accuracy" in train:
        train.loc[train["steps_taken"] == 0, "accuracy"] = math.nan  # policy = base: rounding decides
    for column in [c for c in METRICS.values() if c in train]:
        mean = train[column].rolling(window, center=True, min_periods=1).mean()
        train[f"{column}_smoothed"] = mean.where(train[column].notna())
    loss = str(run.setting("module.loss") or "sigmoid")
    return Training(pd.concat([train, val], ignore_index=True), window, loss, _interval(run), _noise(run))


def _logged(run: Run, split: str, shift: int) -> pd.DataFrame:
    """Metrics of a split by steps taken, which are ``shift`` more than the step they were logged at."""
    columns = {metric(split, name): column for name, column in METRICS.items()}
    present = run.metrics[[name for name in columns if name in run.metrics]].dropna(how="all")
    part = present.rename(columns=columns)
    part.insert(0, "steps_taken", run.metrics.loc[part.index, "step"] + shift)
    part.insert(0, "split", split)
    return part.drop_duplicates("steps_taken", keep="last")


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


def _reading(training: Training) -> list[str]:
    lines = [
        "x counts the optimizer steps taken before the measurement: a training loss is measured before its own update.",
        "Training: "
        + (
            "each step's own pairs."
            if training.window == 1
            else f"thin, each step's own pairs; thick, mean of {training.window} steps around."
        )
        + " Points: all held-out pairs.",
    ]
    if n_lost := int((~(training.table["loss"].abs() < math.inf)).sum()):
        lines.append(f"{n_lost} measurements of the loss are not finite and are not drawn.")
    if training.is_of_pairs:
        lines += [
            "Accuracy: share of pairs whose chosen response has the higher implicit reward; ½ is chance. None at 0 steps, "
            "where policy and base are equal." + training.noise,
            "Implicit reward: β · log(π/π₀) of the whole response, π the policy and π₀ the base; 0 at the start. That both "
            "rewards fall is common in DPO: the loss sees only their difference.",
        ]
    return lines


def _interval(run: Run) -> str:
    table = run.held_out
    if table is None or "rewards/accuracies" not in table:
        return ""
    interval = share_interval(table["rewards/accuracies"].tolist(), table["prompt"].astype(str).tolist())
    return f" 95 % CI {interval.low:.3f} … {interval.high:.3f} ({len(table)} pairs, over prompts; held_out.csv)."


def _noise(run: Run) -> str:
    if run.setting("data._target_") != f"{SyntheticWorld.__module__}.{SyntheticWorld.__qualname__}":
        return ""
    default = inspect.signature(SyntheticWorld).parameters["label_noise"].default
    noise = run.node("data").get("label_noise", default)
    if not isinstance(noise, float) or not 0 < noise < 0.5:
        return ""
    return (
        f" {noise:.0%} of the training labels are swapped at random, so about {1 - noise:.2f} is the most that training "
        "accuracy should reach; held-out pairs are scored against their clean labels."
    )
