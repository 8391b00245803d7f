"""The number of optimizer steps, the learning rate over them, and the numbers that options of a module may be."""

import math
from typing import Literal

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

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


def steps_of_fit(trainer: Trainer, steps_per_epoch: int) -> int:
    """Optimizer steps that a trainer will take.

    Raises:
        UserError: no end, or no step.
    """
    max_epochs = trainer.max_epochs
    by_epochs = math.inf if max_epochs is None or max_epochs == -1 else max_epochs * steps_per_epoch
    by_steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    if steps_per_epoch < 1 or not 1 <= min(by_epochs, by_steps) < math.inf:
        raise UserError(
            f"trainer: max_epochs={max_epochs}, max_steps={trainer.max_steps} and limit_train_batches="
            f"{trainer.limit_train_batches} of {steps_per_epoch} steps an epoch: expected at least one step, and an end; set them"
        )
    return int(min(by_epochs, by_steps))


def set_options_of_next_step(optimizer: Optimizer, scheduler: LambdaLR) -> None:
    """Its own options, and the rate as the schedule has it now: a checkpoint restores those that it was saved under."""
    for group in optimizer.param_groups:
        group |= {**optimizer.defaults, "initial_lr": optimizer.defaults["lr"]}
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    scheduler._last_lr = [base * scheduler.lr_lambdas[0](scheduler.last_epoch) for base in scheduler.base_lrs]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def check_number(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """Raise UserError unless low ≤ value < high (low < value with ``above``)."""
    if not (low < value if above else low <= value) or not value < high:
        least = f"above {low:g}" if above else f"at least {low:g}"
        raise UserError(
            f"module.{name}: expected a finite number {least}{f' and below {high:g}' if high < math.inf else ''}, got {value}"
        )
