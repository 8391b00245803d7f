"""Callbacks that do to a run what goes wrong on clusters; added from the command line (``+callbacks.fault={_target_: …}``)."""

import os
import signal
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback as Callback_
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from datamodules.splits import Split
from lightning_modules.base import LogProbModule
from lightning_modules.pair_metrics import PairResults
from tiltmeter.pairs.batch import PreferenceBatch


class SignalInStep(Callback_):
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


def poison(module: LogProbModule, factor: Callable[[int], float], *, gradient_only: bool = False) -> None:
    """Multiply the training objective of this process.

    Args:
        factor: of a step (optimizer steps taken before it); 1 leaves it as it is.
        gradient_only: the gradient alone.
    """
    original = module.pair_results

    def changed(batch: PreferenceBatch, split: Split) -> PairResults:
        results = original(batch, split)
        by = factor(module.trainer.global_step) if split == "train" else 1.0
        if by == 1:
            return results
        if gradient_only:
            results.objective.register_hook(lambda gradient: gradient * by)
            return results
        columns = results.columns.clone()
        columns[:, 0] *= by
        return results._replace(objective=results.objective * by, columns=columns)

    module.pair_results = changed  # type: ignore[method-assign]


class Kept(Callback_):
    """Weights, moments and metrics behind every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[list[dict[str, Tensor]]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.weights.append({name: local(value).clone() for name, value in pl_module.state_dict().items()})
        states = trainer.optimizers[0].state.values()
        self.moments.append([{name: local(value).clone() for name, value in state.items()} for state in states])
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def local(value: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    return value.to_local() if isinstance(value, DTensor) else value
