"""ChangedWeights: how many weights have really changed so far?"""

from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.probe_session import log, model_of
from callbacks.schedule import Scheduled
from tiltmeter.errors import UserError
from tiltmeter.metric_names import metric
from tiltmeter.weights.sampled import N_ENTRIES, sampled_weights

_KEPT = "changed_weights_base"


class ChangedWeights(Scheduled):
    """Logs the share of the decoder blocks' weights whose bfloat16 values differ from the base's, adapters added.

    Of a fixed random sample: no second copy of the model is kept. A sharded model is left to ``analyze.py analysis=weights``.

    Args:
        n_entries: of the sample.
        every_n_steps: see :class:`~callbacks.schedule.Scheduled`.
    """

    def __init__(self, *, n_entries: int = N_ENTRIES, every_n_steps: int | None = None) -> None:
        super().__init__(every_n_steps=every_n_steps)
        if n_entries < 1:
            raise UserError(f"callbacks: n_entries: expected at least 1, got {n_entries}")
        self.n_entries = n_entries
        self._base: Tensor | None = None

    def look(self, trainer: Trainer, module: LightningModule) -> None:
        """Compare the sample with that of the base."""
        if not trainer.is_global_zero or cast(Any, module).device_mesh is not None:
            return
        now = sampled_weights(model_of(module), n_entries=self.n_entries)
        if trainer.global_step == 0:
            self._base = now
        if self._base is not None and len(now) == len(self._base) and len(now):
            log(trainer, {metric("weights", "changed_share"): float((now != self._base).float().mean())})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the base's sample: a resumed run couldn't read it any more."""
        if self._base is not None:
            checkpoint[_KEPT] = self._base

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        self._base = checkpoint.get(_KEPT)
