"""Callbacks that do to a run what goes wrong on clusters; added from the command line (``+callbacks.fault={_target_: …}``)."""

import os
import signal

from lightning.pytorch import Callback, LightningModule, Trainer


class SignalInStep(Callback):
    """Sends one process a signal inside an optimizer step, once gradients are there.

    Args:
        step: optimizer steps taken before it.
        rank: the process; None: all of them.
        name: of the signal.
    """

    def __init__(self, *, step: int, rank: int | None = 0, name: str = "SIGTERM") -> None:
        self.step, self.rank, self.number = step, rank, signal.Signals[name]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            self.step = -1
            os.kill(os.getpid(), self.number)
