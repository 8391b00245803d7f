"""TruthfulQAMetrics: the model in training on TruthfulQA's multiple choice, by teacher forcing."""

from typing import Any, cast

import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.behaviour.scoring import record_figures
from callbacks.probe_session import data_of
from callbacks.schedule import Scheduled
from tiltmeter.scoring.truthfulqa import TruthfulQA


class TruthfulQAMetrics(Scheduled):
    """Logs ``behaviour/truthfulqa_…``; all processes take their share of the questions.

    Args:
        questions: null: does nothing.
        every_n_steps, epochs: see :class:`~callbacks.schedule.Scheduled`.
    """

    def __init__(self, *, questions: TruthfulQA | None, **options: Any) -> None:
        super().__init__(**options)
        self.questions = questions
        self._is_started = False

    def start(self) -> None:
        """Read the questions, once. Raises UserError."""
        if self.questions is not None and not self._is_started:
            self.questions.start()
            self._is_started = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self.start()

    def look(self, trainer: Trainer, module: LightningModule) -> None:
        """Score the model as it is."""
        questions, tokenizer = self.questions, data_of(trainer).tokenizer
        if questions is None or tokenizer is None:
            return
        rank, world_size = trainer.global_rank, trainer.world_size

        def gather(log_probs: Tensor) -> Tensor:
            if world_size == 1:
                return log_probs
            on_device = log_probs.to(trainer.strategy.root_device)
            torch.distributed.all_reduce(on_device)
            return on_device.cpu()

        with trainer.precision_plugin.forward_context():
            scores = cast(Any, module).trained_policy.run(
                lambda model: questions.score(model, tokenizer, rank=rank, world_size=world_size, gather=gather)
            )
        if trainer.is_global_zero:
            record_figures(trainer, scores.figures)
