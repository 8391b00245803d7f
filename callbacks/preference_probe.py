"""PreferenceProbe: can a linear probe read the preference off hidden states, and better so than from the base's?"""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from callbacks.behaviour.scoring import record_figures
from callbacks.observer import Observer
from tiltmeter.pairs.batch import CHOSEN
from tiltmeter.scoring.preference_classifier import classifier_figures
from tiltmeter.states.positions import Position
from tiltmeter.states.state_pair import StatePair


class PreferenceProbe(Observer):
    """Logs ``behaviour/preference_probe_accuracy/<site>``, held out by prompt, and a null beside it.

    Args:
        sites, every_n_steps: see :class:`~callbacks.observer.Observer`.
        position: of each response, ``response_last`` or ``response_mean``.
    """

    def __init__(
        self,
        *,
        sites: str | Sequence[str] = "final_pre_norm",
        position: Position = "response_last",
        every_n_steps: int | None = None,
    ) -> None:
        super().__init__(sites=sites, positions=(position,), every_n_steps=every_n_steps)

    def on_observation(self, trainer: Trainer, module: LightningModule, seen: StatePair) -> None:
        """Fit and score."""
        if not trainer.is_global_zero:
            return
        for point in self.points(module, seen):
            found = seen.policy[point]
            is_chosen = found.sides == CHOSEN
            where, groups = f"{point.site} {point.position}", seen.clusters or ()
            figures = classifier_figures(
                found.rows[is_chosen], found.rows[~is_chosen], groups, of="policy", where=where
            )
            record_figures(trainer, [figure._replace(name=f"{figure.name}/{point.site}") for figure in figures])
