"""TrainingAlarms: what usually goes wrong in preference optimisation, said while it happens."""

from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.observation import log
from tiltmeter.batch import StepBatch
from tiltmeter.errors import NumericalStop

_SEEN_IN = {
    "train/logps/chosen": "chosen_logp_drop",
    "train/rewards/accuracies": "accuracy_saturation",
    "length_ratio": "length_ratio",
}


class TrainingAlarms(Callback):
    """Logs ``alarm/…`` every few steps and says once in words when one goes off.

    - ``alarm/chosen_logp_drop``: nats that chosen responses have lost since the first window (likelihood displacement).
    - ``alarm/accuracy_saturation``: share of training pairs ordered rightly: at 1 only margins are left to grow.
    - ``alarm/length_ratio``: tokens of chosen over rejected responses: far from 1, length can pass for preference.
    - ``alarm/nan``: 1 when training stops for a loss or gradient that isn't finite (the error names the pairs).

    Args:
        window: optimizer steps of a mean, and how often to log.
        chosen_logp_drop: nats that are worth an alarm.
        accuracy_saturation: accuracy that is.
        length_ratio: ratio, or one over it, that is.
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
        self.limits = dict(zip(_SEEN_IN.values(), (chosen_logp_drop, accuracy_saturation, length_ratio), strict=True))
        self._first_logp: float | None = None
        self._recent: dict[str, deque[float]] = {}
        self._said: set[str] = set()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        """Look at the step's own metrics."""
        for name in _SEEN_IN.keys() & trainer.callback_metrics.keys():
            self._remember(name, float(trainer.callback_metrics[name]))
        counts = [(b.target_counts.view(-1, b.n_pairs) * b.weights).sum(1) for b in batch.micro_batches]
        if counts and len(counts[0]) == 2:
            chosen, rejected = (float(sum(c[side] for c in counts)) for side in (0, 1))
            self._remember("length_ratio", chosen / max(rejected, 1.0))
        if trainer.global_step % self.window == 0:
            self._report(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A numerical stop is an alarm too."""
        if isinstance(exception, NumericalStop):
            log(trainer, {"alarm/nan": 1.0})

    def _remember(self, name: str, value: float) -> None:
        self._recent.setdefault(name, deque(maxlen=self.window)).append(value)

    def _report(self, trainer: Trainer, module: LightningModule) -> None:
        means = {name: sum(values) / len(values) for name, values in self._recent.items()}
        alarms = {"nan": 0.0} | {alarm: means[name] for name, alarm in _SEEN_IN.items() if name in means}
        if "chosen_logp_drop" in alarms:
            self._first_logp = alarms["chosen_logp_drop"] if self._first_logp is None else self._first_logp
            alarms["chosen_logp_drop"] = self._first_logp - alarms["chosen_logp_drop"]
        log(trainer, {f"alarm/{name}": value for name, value in alarms.items()})
        for name, limit in self.limits.items():
            value = alarms.get(name, 0.0)
            if max(value, 1 / value if name == "length_ratio" and value else value) >= limit and name not in self._said:
                self._said.add(name)
                module.print(f"alarm/{name}: {value:.3g} at step {trainer.global_step} (alarm from {limit:g})")
