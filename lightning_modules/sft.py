"""Supervised fine-tuning on chosen text: makes bases for models from scratch, and the control that DPO is held against."""

from typing import Any

import torch
from torch import Tensor

from datamodules.preference import Objective
from datamodules.splits import Split
from lightning_modules.base import LogProbModule
from lightning_modules.pair_metrics import PairResults
from tiltmeter.errors import UserError
from tiltmeter.pairs.batch import PreferenceBatch, StepBatch


class SFTModule(LogProbModule):
    """Minimises −log π(token) averaged over the target tokens of the step.

    Args:
        predict_prompt: also learn the prompt's tokens; for models from scratch, which must learn the language first.
        learning_rate and the rest: see :class:`~lightning_modules.base.LogProbModule`.
    """

    objective: Objective = "chosen"
    columns = ("nll", "target_tokens")

    def __init__(self, *, predict_prompt: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if self.factory.vector is not None and self.factory.vector.both_signs:
            raise UserError("module.vector.both_signs: needs a preference loss; take module=dpo, or leave it out")
        self.predict_prompt = predict_prompt

    def divisor(self, step: StepBatch) -> int:
        """Target tokens of the step."""
        return step.n_targets

    def pair_results(self, batch: PreferenceBatch, split: Split) -> PairResults:
        """Negative log-likelihood of the chosen transcripts, in nats."""
        nll = -self.trained_policy(batch)
        columns = torch.stack([nll.detach().float(), batch.target_counts.float()], dim=1)
        return PairResults((nll * batch.weights).sum(), columns)

    def metrics_from_sums(self, sums: Tensor) -> dict[str, Tensor]:
        """Loss per token over all tokens, and the mean log-prob of a transcript."""
        nll, n_tokens, n_pairs = sums
        return {"loss": nll / n_tokens, "logps/chosen": -nll / n_pairs}
