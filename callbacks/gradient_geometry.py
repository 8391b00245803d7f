"""GradientGeometry: which way does the loss pull the final hidden states, while it trains?"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.probe_session import ProbeSession, log, model_of
from tiltmeter.errors import UserError
from tiltmeter.geometry.directions import sequence_preference_vectors
from tiltmeter.geometry.gradients import GradientMoments, rows_that_predict
from tiltmeter.metric_names import metric
from tiltmeter.models.layers import FINAL_POST_NORM
from tiltmeter.pairs.batch import PreferenceBatch, StepBatch
from tiltmeter.states.capture import ReadPoint, capture_gradients
from tiltmeter.states.observed_metrics import known

_STEERING = ReadPoint(FINAL_POST_NORM, "prompt_last")


class GradientGeometry(Callback):
    """The gradient of the loss with respect to the final hidden states: its mean resultant, and its energy along v̄ and v*.

    A hook sees the gradients that training computes anyway. Logs ``gradient/mean_resultant`` (1: all pull one way) and
    ``gradient/energy_along_…``: ``sequence`` (each pair's own v̄), ``steering`` (v* of the last look at ``prompt_last``).

    Supervised fine-tuning has no rejected side and so no v̄: nothing is logged there. ``every_n_steps`` says how often.
    """

    def __init__(self, *, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise UserError(f"callbacks: every_n_steps: expected at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._batches: Iterator[PreferenceBatch] = iter(())
        self._moments: GradientMoments | None = None
        self._hooks = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the hook on."""
        session, model = ProbeSession.of(trainer), model_of(pl_module)
        head = session.head(pl_module)
        self._moments = GradientMoments(head.weight.shape[1], names=["sequence", "steering"], device=pl_module.device)

        def receive(gradient: Tensor) -> None:
            batch = next(self._batches, None)
            if batch is None or batch.layout == "chosen_only":
                return
            rows, pairs = rows_that_predict(batch)
            steering = session.steering.get(_STEERING, torch.zeros(gradient.shape[-1])).to(gradient.device)
            along = {"sequence": sequence_preference_vectors(head, batch)[pairs], "steering": steering[None]}
            assert self._moments is not None
            self._moments.update(gradient.flatten(0, 1)[rows], along)

        self._hooks.enter_context(capture_gradients(model, receive))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: StepBatch, batch_idx: int
    ) -> None:
        """Backward passes come in the order of micro-batches."""
        self._batches = iter(batch.micro_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log and begin again."""
        if trainer.global_step % self.every_n_steps:
            return
        assert self._moments is not None
        seen = self._moments.all_reduce(lambda sums: trainer.strategy.reduce(sums, reduce_op="sum")).summary()
        self._moments.reset()
        along = {f"energy_along_{name}": share for name, share in seen.energy_shares.items() if share > 0}
        figures = {"mean_resultant": seen.mean_resultant} | along
        log(trainer, known({metric("gradient", name): value for name, value in figures.items()}))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hook off, however training ended."""
        self._hooks.close()
