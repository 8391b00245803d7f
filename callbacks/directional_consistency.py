"""DirectionalConsistency: do the updates of all prompts point the same way, and since when?"""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from callbacks.observer import Observer
from callbacks.probe_session import ProbeSession, log, report_failed_write
from tiltmeter.metric_names import place
from tiltmeter.states.capture import ReadPoint
from tiltmeter.states.observed_metrics import Metrics, consistency_metrics
from tiltmeter.states.state_pair import StatePair
from tiltmeter.steering.vector import V_STAR, SteeringVector, VectorId, save_vectors


class DirectionalConsistency(Observer):
    """Cosines of each update with the mean update v*, in-sample and leave-one-out, with null bands (the paper's Fig. 3).

    At the end v* of every site is written to ``vectors/steering.safetensors`` in the run folder.

    Args:
        sites, positions, every_n_steps: see :class:`~callbacks.observer.Observer`.
    """

    def on_observation(self, trainer: Trainer, module: LightningModule, seen: StatePair) -> None:
        """Log the cosines, and write the vectors as they are now."""
        if not trainer.is_global_zero:
            return
        metrics: Metrics = {}
        previous, points = ProbeSession.of(trainer).previous, self.points(module, seen)
        for point in points:
            metrics |= consistency_metrics(seen, point, previous=previous.get(point))
        log(trainer, metrics)
        if seen.steps_taken:
            self._write(trainer, seen, points)

    def _write(self, trainer: Trainer, seen: StatePair, wanted: Sequence[ReadPoint]) -> None:
        path = Path(trainer.default_root_dir) / "vectors" / "steering.safetensors"
        made = "v*, mean of h_policy - h_base over the probe's pairs"
        facts = {"n_rows": str(len(seen.base[wanted[0]].rows)), "steps_taken": str(seen.steps_taken)}
        vectors = {
            place(p): SteeringVector(VectorId(V_STAR, *p), v.float(), made=made, provenance=facts)
            for p, v in seen.steering_vectors().items()
            if p in wanted
        }
        try:
            save_vectors(path, vectors, about={"what": made, **facts})
        except OSError as error:
            report_failed_write(path, error, trainer)
