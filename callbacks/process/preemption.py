"""Preemption: a signal asks the run to stop; all processes save the same step and stop together."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.process.stop_signals import SIGNALS, StopSignals
from tiltmeter.errors import NumericalStop, Preempted, UserError


class Preemption(Callback):
    """The first signal ends training before the next optimizer step, with a checkpoint; a second one ends the process at once.

    The handler only sets a flag, on which the processes agree between steps, so that a signal to any one of them stops all.
    A step's validation, looks and metrics belong to it and are finished first. Before the first step there is nothing to
    finish or to save; after the last one, the run ends as it would have.

    Args:
        checkpoint: says which file to write; None: nothing is kept.
    """

    def __init__(self, checkpoint: ModelCheckpoint | None) -> None:
        self.checkpoint = checkpoint
        self.signals = StopSignals()
        self._first_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Handle signals in place of Lightning, whose handler waits for other processes and whose exit code is 0."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self.signals.install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.signals.has_work, self._first_step = True, trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Everything that belongs to the step before is done: stop here if any process was asked to."""
        asked = torch.tensor(self.signals.code, device=trainer.strategy.root_device)
        if code := int(trainer.strategy.reduce(asked, reduce_op="max")):
            saved = self._save(trainer)
            raise Preempted(SIGNALS[code - 1], after_step=trainer.global_step, checkpoint=saved)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.signals.restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Also where no step was left to take."""
        self.signals.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let processes that this one started end by themselves, with the same exception; or with it, if it fails alone."""
        self.signals.restore()
        started = getattr(trainer.strategy.launcher, "procs", [])
        for process in () if isinstance(exception, Preempted | NumericalStop | UserError) else started:
            process.kill()
        started.clear()  # or Lightning would kill this process as soon as one of them has left

    def _save(self, trainer: Trainer) -> str | None:
        if self.checkpoint is None or trainer.global_step == self._first_step:
            return None
        progress = trainer.fit_loop.epoch_loop.batch_progress
        progress.total.ready -= 1  # the batch that was fetched has not begun
        progress.current.ready -= 1
        progress.is_last_batch = False
        path = self.checkpoint.format_checkpoint_name({})
        if self.checkpoint._last_global_step_saved != trainer.global_step:  # or this step's validation did
            trainer.save_checkpoint(path)
        failure = trainer.strategy.broadcast(getattr(trainer.strategy.checkpoint_io, "failure", None))
        if failure is not None:  # the first process has said so, and this exit is no promise
            raise failure
        return path
