"""PreferenceMetrics: does the policy rank held-out pairs as people did? With intervals, over all pairs and by source."""

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.behaviour.scoring import record_figures
from callbacks.probe_session import data_of
from datamodules.records import score_margins
from tiltmeter.scoring.preference import preference_scores_of_validation


class PreferenceMetrics(Callback):
    """Logs ``behaviour/preference_accuracy``, ties, margin and log-prob drift after every validation of a preference run."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score what the validation found; pairs that it left out (``trainer.limit_val_batches``) are left out here too."""
        module: Any = pl_module
        table = module.validation_table
        if trainer.sanity_checking or table is None or "rewards/chosen" not in module.columns:
            return
        if trainer.is_global_zero:
            records = data_of(trainer).splits["val"].records
            there = (~table.isnan().all(1)).nonzero()[:, 0].tolist()
            columns = {name: table[there, i].tolist() for i, name in enumerate(module.columns)}
            scores = preference_scores_of_validation(
                columns,
                beta=cast(float, module.loss.beta),
                groups=[records[row].group for row in there],
                sources=[records[row].source for row in there],
                weights=score_margins(records[row].attributes for row in there),
            )
            record_figures(trainer, scores.figures)
