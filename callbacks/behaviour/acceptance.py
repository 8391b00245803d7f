"""Acceptance: nothing of a run is written before everything about it is accepted."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Acceptance(Callback):
    """Calls a function once, as soon as nothing is left that could refuse the run; goes in front of all other callbacks.

    A new run is accepted when training starts, before others look at its base. One that goes on is accepted after all have said
    at that start whether the checkpoint has what they need: before its first batch, or what an epoch has left to do behind its
    last one. Where nothing is left to do, call :meth:`accept` after ``fit``.

    Args:
        begin: writes, on every process alike.
    """

    def __init__(self, begin: Callable[[Trainer], object]) -> None:
        self._begin: Callable[[Trainer], object] | None = begin

    def accept(self, trainer: Trainer) -> None:
        """Call it, unless it was called."""
        begin, self._begin = self._begin, None
        if begin is not None:
            begin(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new run."""
        if trainer.global_step == 0:
            self.accept(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """One that goes on."""
        self.accept(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One that goes on between an epoch's last batch and its validation."""
        self.accept(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One that goes on behind that."""
        self.accept(trainer)
