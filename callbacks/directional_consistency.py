"""DirectionalConsistency: do the updates of all prompts point the same way, and since when?"""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from callbacks.observation import Observation, log, report_failed_write
from callbacks.observer import Observer
from tiltmeter.states.observed_metrics import Metrics, consistency_metrics, place, steering_vectors
from tiltmeter.steering.vector import V_STAR, SteeringVector, VectorId, save_vectors


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
        made = "v*, mean of h_policy - h_base over the probe's pairs"
        facts = {"n_rows": str(len(seen.base[wanted[0]].rows)), "steps_taken": str(seen.step)}
        vectors = {
            place(p): SteeringVector(VectorId(V_STAR, *p), v.float(), made=made, provenance=facts)
            for p, v in steering_vectors(seen.base, seen.policy).items()
            if p in wanted
        }
        try:
            save_vectors(path, vectors, about={"what": made, **facts})
        except OSError as error:
            report_failed_write(path, error, trainer)
