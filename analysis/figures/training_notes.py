"""What a reader must know of a run's training curves: what they claim, their unit, their interval and planted noise."""

import inspect
import math

import pandas as pd

from analysis.open.runs import Run
from datamodules.synthetic import SyntheticWorld
from tiltmeter.stats.proportions import share_interval

_STARTS_AT_LN_2 = ("sigmoid", "robust")
"""Losses that are ln 2 nats for a policy equal to its reference."""
_WITHOUT_UNIT = ("hinge", "ipo")


def claim_of(table: pd.DataFrame) -> str:
    """What training is claimed to do."""
    if "accuracy" in table:
        return "DPO (Rafailov et al. 2023): the policy learns to rank responses as their labels do, also on prompts not trained on."
    return "None of the papers’: supervised training lowers the loss, also on prompts that it was not done on."


def reading_of_training(run: Run, table: pd.DataFrame, *, window: int) -> list[str]:
    """How to read the curves.

    Args:
        table: :func:`analysis.figures.training.training_table`.
        window: of the running mean, in steps.
    """
    lines = [
        "x counts the optimizer steps taken before the measurement: a training loss is measured before its own update.",
        "Training: "
        + (
            "each step's own pairs."
            if window == 1
            else f"thin, each step's own pairs; thick, mean of {window} steps around."
        )
        + " Points: all held-out pairs.",
    ]
    if n_lost := int((~(table["loss"].abs() < math.inf)).sum()):
        lines.append(f"{n_lost} measurements of the loss are not finite and are not drawn.")
    if "accuracy" in table:
        lines += [
            "Accuracy: share of pairs whose chosen response has the higher implicit reward; ½ is chance. None at 0 steps, "
            "where policy and base are equal." + noise_note(run),
            "Implicit reward: β · log(π/π₀) of the whole response, π the policy and π₀ the base; 0 at the start. That both "
            "rewards fall is common in DPO: the loss sees only their difference.",
        ]
    return lines


def _loss_name(run: Run) -> str:
    return str(run.setting("module.loss") or "sigmoid")


def starts_at_ln_2(run: Run, table: pd.DataFrame) -> bool:
    """Whether the loss of a policy equal to its reference is ln 2 nats."""
    return "accuracy" in table and _loss_name(run) in _STARTS_AT_LN_2


def loss_unit(run: Run, table: pd.DataFrame) -> str:
    """Label of the loss axis."""
    if "accuracy" not in table:
        return "loss (nats per token)"
    return "loss (nats)" if _loss_name(run) not in _WITHOUT_UNIT else f"loss ({_loss_name(run)})"


def interval_note(run: Run) -> str:
    """95 % interval over prompts of the last held-out accuracy; empty for runs without held_out.csv."""
    table = run.held_out
    if table is None or "rewards/accuracies" not in table:
        return ""
    interval = share_interval(table["rewards/accuracies"].tolist(), table["prompt"].astype(str).tolist())
    return f" 95 % CI {interval.low:.3f} … {interval.high:.3f} ({len(table)} pairs, over prompts; held_out.csv)."


def noise_note(run: Run) -> str:
    """Planted label noise, which a person must know to judge train accuracy beside held-out accuracy."""
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
