"""The schedule of a callback: before the first step, at the ends of epochs and, if asked, every few steps; once a step."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from tiltmeter.errors import UserError


class Scheduled(Callback):
    """Calls :meth:`look` on every process.

    Args:
        every_n_steps: look after so many optimizer steps too; null: at the start and at the ends of epochs.
        epochs: at the ends of these epochs, counted from 0, and at the start; null: of all.
    """

    def __init__(self, *, every_n_steps: int | None = None, epochs: Sequence[int] | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"callbacks: every_n_steps: expected at least 1 or null, got {every_n_steps}")
        if epochs is not None and any(not isinstance(epoch, int) or epoch < 0 for epoch in epochs):
            raise UserError(f"callbacks: epochs: expected whole numbers from 0 or null, got {list(epochs)}")
        self.every_n_steps = every_n_steps
        self.epochs = None if epochs is None else frozenset(epochs)
        self._looked_at: int | None = None

    def look(self, trainer: Trainer, module: LightningModule) -> None:
        """Look; every process calls this, at most once after each step."""
        raise NotImplementedError

    def on_resume(self, trainer: Trainer, module: LightningModule) -> None:
        """Called instead of the first look when a run goes on: may refuse to, and writes nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The base model, before the first step."""
        if trainer.global_step == 0:
            self._look_once(trainer, pl_module)
        else:
            self.on_resume(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every few steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._look_once(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of an epoch."""
        if self.epochs is None or trainer.current_epoch in self.epochs:
            self._look_once(trainer, pl_module)

    def _look_once(self, trainer: Trainer, module: LightningModule) -> None:
        if self._looked_at != trainer.global_step:
            self._looked_at = trainer.global_step
            self.look(trainer, module)
