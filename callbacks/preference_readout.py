"""PreferenceReadout: can chosen and rejected responses still be told apart by their states, and as the base's are?"""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from callbacks.observer import Observer
from callbacks.probe_session import log
from tiltmeter.geometry.readout import LEAST_TEXTS, N_FOLDS, readout_aucs
from tiltmeter.metric_names import at, metric
from tiltmeter.pairs.batch import CHOSEN
from tiltmeter.states.state_pair import StatePair


class PreferenceReadout(Observer):
    """Logs ``readout/auc/<site>``, of a linear map fitted anew on the policy's states, and ``readout/auc_of_base/<site>``.

    The latter is of the map that was fitted on the base's states and is applied to the policy's; both out of fold, by prompt.
    States are the mean over each response's tokens. A probe of fewer than 15 pairs is too small, and nothing is logged.

    Args:
        sites, every_n_steps: see :class:`~callbacks.observer.Observer`.
    """

    def __init__(self, *, sites: str | Sequence[str] = "final_pre_norm", every_n_steps: int | None = None) -> None:
        super().__init__(sites=sites, positions=("response_mean",), every_n_steps=every_n_steps)
        self._has_said = False

    def on_observation(self, trainer: Trainer, module: LightningModule, seen: StatePair) -> None:
        """Fit and apply."""
        if not trainer.is_global_zero:
            return
        for point in self.points(module, seen):
            found = seen.at(point.position).finite()
            groups = found.clusters_of(point)
            if len(groups) < LEAST_TEXTS or len(set(groups)) < N_FOLDS:
                self._say(module, len(groups), len(set(groups)))
                return
            aucs = readout_aucs(*found.rows(point), found.policy[point].sides == CHOSEN, groups)
            of_both = {"auc": aucs["retrained"], "auc_of_base": aucs["policy"]}
            log(trainer, {at(metric("readout", name), point): value for name, value in of_both.items()})

    def _say(self, module: LightningModule, n_texts: int, n_prompts: int) -> None:
        if not self._has_said:
            module.print(
                f"Readout: none of {n_texts} responses to {n_prompts} prompts; it takes {LEAST_TEXTS} to {N_FOLDS} "
                "(datamodule.probe_pairs)"
            )
        self._has_said = True
