"""One progress bar with loss, accuracy and time left."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from tiltmeter.metric_names import metric

_ACCURACIES = "rewards/accuracies"
_SHOWN = {
    metric("train", "loss"): "loss",
    metric("sparse", "loss"): "loss",
    metric("train", _ACCURACIES): "accuracy",
    metric("val", _ACCURACIES): "held-out accuracy",
}


class TrainingProgress(RichProgressBar):
    """Lightning's rich bar with the names that people say, and what is being trained in front."""

    def __init__(self, title: str = "DPO") -> None:
        super().__init__(leave=False)
        self._title = title

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Loss and accuracies, from whatever the module logged last."""
        known = trainer.callback_metrics
        return {short: round(float(known[name]), 3) for name, short in _SHOWN.items() if name in known}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{self._title}, epoch {current_epoch + 1} of {self.trainer.max_epochs}"
