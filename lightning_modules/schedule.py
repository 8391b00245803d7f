"""The learning rate over the optimizer steps, and what numbers the options of a module may be."""

import math
from typing import Literal

from tiltmeter.errors import UserError

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(step: int, *, total_steps: int, warmup_share: float, schedule: Schedule) -> float:
    """Share of the peak learning rate at an optimizer step: a linear rise, then constant, linear or cosine to 0.

    Step 0 already trains, and so does the last one.

    >>> [learning_rate_factor(s, total_steps=4, warmup_share=0.5, schedule="linear") for s in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warmup = round(warmup_share * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if schedule == "constant":
        return 1.0
    return 1.0 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def check_number(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """Raise UserError unless low ≤ value < high (low < value with ``above``)."""
    if not (low < value if above else low <= value) or not value < high:
        least = f"above {low:g}" if above else f"at least {low:g}"
        raise UserError(
            f"module.{name}: expected a finite number {least}{f' and below {high:g}' if high < math.inf else ''}, got {value}"
        )
