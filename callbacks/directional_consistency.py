"""DirectionalConsistency: do the updates of all prompts point the same way, and since when?"""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file

from callbacks.observation import Observation, log, report_failed_write
from callbacks.observer import Observer
from tiltmeter.files import write_atomically
from tiltmeter.metric_names import place
from tiltmeter.states.observed_metrics import Metrics, consistency_metrics, steering_vectors


class DirectionalConsistency(Observer):
    """Cosines of each update with the mean update v*, in-sample and leave-one-out, with null bands (the paper's Fig. 3).

    At the end v* of every site is written to ``vectors/steering.safetensors`` in the run folder.

    Args:
        sites, positions, every_n_steps: see :class:`~callbacks.observer.Observer`.
    """

    def on_observation(self, trainer: Trainer, module: LightningModule, seen: Observation) -> None:
        """Log the cosines, and write the vectors as they are now."""
        if not trainer.is_global_zero:
            return
        metrics: Metrics = {}
        for point in self.points(seen):
            previous = (seen.previous or {}).get(point)
            metrics |= consistency_metrics(seen.base, seen.policy, point, previous=previous)
        log(trainer, metrics)
        if seen.step:
            self._write(trainer, seen)

    def _write(self, trainer: Trainer, seen: Observation) -> None:
        path = Path(trainer.default_root_dir) / "vectors" / "steering.safetensors"
        wanted = self.points(seen)
        vectors = {place(p): v.float() for p, v in steering_vectors(seen.base, seen.policy).items() if p in wanted}
        about = {
            "what": "v*, mean of h_policy - h_base over the probe's pairs",
            "n_rows": str(len(seen.base[wanted[0]].rows)),
            "steps_taken": str(seen.step),
        }
        try:
            write_atomically(path, lambda temporary: save_file(vectors, temporary, metadata=about))
        except OSError as error:
            report_failed_write(path, error, trainer)
