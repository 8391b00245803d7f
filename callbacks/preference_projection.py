"""PreferenceProjection: do hidden states move along what the preference asks for?"""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from callbacks.observer import Observer
from callbacks.probe_session import ProbeSession, log
from tiltmeter.states.observed_metrics import Metrics, projection_metrics
from tiltmeter.states.state_pair import StatePair


class PreferenceProjection(Observer):
    """⟨h, v⟩ of base and policy at every site, for v and v̄, with paired intervals over prompts (the paper's Fig. 1a).

    Read where v is defined: at the state that predicts the first token in which chosen and rejected differ.

    Args:
        sites, every_n_steps: see :class:`~callbacks.observer.Observer`.
    """

    def __init__(self, *, sites: str | Sequence[str] = "all", every_n_steps: int | None = None) -> None:
        super().__init__(sites=sites, positions=("diverge",), every_n_steps=every_n_steps)

    def on_observation(self, trainer: Trainer, module: LightningModule, seen: StatePair) -> None:
        """Log the projections."""
        session = ProbeSession.of(trainer)
        directions, head = session.directions(trainer, module), session.head(module)
        if not trainer.is_global_zero:
            return
        metrics: Metrics = {}
        for site, _ in self.points(module, seen):
            metrics |= projection_metrics(seen, site, directions, head=head)
        log(trainer, metrics)
