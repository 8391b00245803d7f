"""RepresentationSimilarity: are the policy's states still arranged as the base's?"""

from lightning.pytorch import LightningModule, Trainer

from callbacks.observer import Observer
from callbacks.probe_session import log
from tiltmeter.states.observed_metrics import Metrics, similarity_metrics
from tiltmeter.states.state_pair import StatePair


class RepresentationSimilarity(Observer):
    """Debiased linear CKA of the base's and the policy's states at every site; blind to one shift of all of them.

    Args:
        sites, positions, every_n_steps: see :class:`~callbacks.observer.Observer`.
    """

    def on_observation(self, trainer: Trainer, module: LightningModule, seen: StatePair) -> None:
        """Log the likeness."""
        if not trainer.is_global_zero:
            return
        metrics: Metrics = {}
        for point in self.points(module, seen):
            metrics |= similarity_metrics(seen, point)
        log(trainer, metrics)
