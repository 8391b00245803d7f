"""TrainingAlarms: what usually goes wrong in preference optimisation, said while it happens."""

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.probe_session import log
from tiltmeter.errors import NumericalStop
from tiltmeter.metric_names import metric
from tiltmeter.pairs.batch import StepBatch

_ALARMS = ("chosen_logp_drop", "accuracy_saturation", "length_ratio")
_MEANS = {metric("train", "rewards/chosen"): _ALARMS[0], metric("train", "rewards/accuracies"): _ALARMS[1]}


class TrainingAlarms(Callback):
    """Logs ``alarm/…`` after every window of optimizer steps, and says once in words when one goes off.

    Chosen responses that lose log-probability against the reference (likelihood displacement); pairs all ordered rightly, so
    that only margins are left to grow; lengths far apart, which can pass for preference; numbers that aren't finite:
    docs/metrics.md has each.

    Args:
        window: optimizer steps.
        chosen_logp_drop, accuracy_saturation, length_ratio: from where it is an alarm (the ratio, or one over it).
    """

    def __init__(
        self,
        *,
        window: int = 10,
        chosen_logp_drop: float = 20.0,
        accuracy_saturation: float = 0.99,
        length_ratio: float = 1.5,
    ) -> None:
        self.window = window
        self.limits = dict(zip(_ALARMS, (chosen_logp_drop, accuracy_saturation, length_ratio), strict=True))
        self._sums, self._said = dict[str, Tensor](), set[str]()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        """Look at the step's metrics; every process counts its own tokens."""
        for name in _MEANS:  # in one order on all processes, which add them up in it
            value = trainer.callback_metrics.get(name)
            if value is not None and value.isfinite():  # or the step was skipped
                self._add(name, torch.stack([value.detach(), torch.ones(())]).to(pl_module.device))
        for micro in batch.micro_batches if batch.micro_batches[0].n_sequences > batch.micro_batches[0].n_pairs else ():
            self._add("length_ratio", (micro.target_counts.view(2, -1) * micro.weights).sum(1))
        if trainer.global_step % self.window == 0 or trainer.global_step == pl_module.total_steps():  # type: ignore[operator]
            self._report(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: D102
        if isinstance(exception, NumericalStop):
            log(trainer, {metric("alarm", "nan"): 1.0})

    def _add(self, name: str, fraction: Tensor) -> None:
        self._sums[name] = fraction + self._sums.get(name, 0)

    def _report(self, trainer: Trainer, module: LightningModule) -> None:
        sums = {name: trainer.strategy.reduce(fraction, reduce_op="sum") for name, fraction in self._sums.items()}
        values, self._sums = {_MEANS.get(k, k): float(above / below) for k, (above, below) in sums.items()}, {}
        if _ALARMS[0] in values:  # a reward is β·log(π/π₀)
            values[_ALARMS[0]] /= -cast(Any, module).loss.beta
        log(trainer, {metric("alarm", name): value for name, value in (values | {"nan": 0.0}).items()})
        for name, value in values.items():
            far = 1 / value if name == "length_ratio" and value else value
            if max(value, far) >= self.limits[name] and name not in self._said:
                self._said.add(name)
                module.print(f"alarm/{name}: {value:.3g} at step {trainer.global_step} (from {self.limits[name]:g})")
