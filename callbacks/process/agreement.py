"""Agreement: the processes of a run compare what they are about to do, before any of them waits for another in vain."""

from collections.abc import Callable, Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import all_gather_object

from callbacks.probe_session import data_of
from tiltmeter.errors import UserError


class Agreement(Callback):
    """Every process ends with the same UserError when two of them were started differently or have nothing to share.

    Args:
        facts: name → value of what has to be the same on all processes; not asked for where there is only one.
    """

    def __init__(self, facts: Callable[[], Mapping[str, str]]) -> None:
        self.facts = facts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare, as soon as processes can."""
        if trainer.world_size == 1:
            return
        self._compare(trainer, self.facts())
        n_pairs = data_of(trainer).pairs_per_step
        if n_pairs < trainer.world_size:
            raise UserError(
                f"datamodule.pairs_per_step={n_pairs}: {trainer.world_size} processes share the pairs of a step; set it to "
                f"{trainer.world_size} or more, or start fewer processes"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare what was loaded, which is known now."""
        if trainer.world_size > 1:
            self._compare(trainer, {"steps of the checkpoint": str(trainer.global_step)})

    def _compare(self, trainer: Trainer, facts: Mapping[str, str]) -> None:
        gathered: list[Mapping[str, str]] = [{}] * trainer.world_size
        all_gather_object(gathered, facts)
        if differing := disagreements(gathered):
            more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"{'; '.join(differing[:3])}{more}; start all processes with the same code, command and data"
            )


def disagreements(gathered: list[Mapping[str, str]]) -> list[str]:
    """Facts that aren't the same on all processes, each with the first two values.

    >>> disagreements([{"seed": "0", "code": "a"}, {"seed": "0", "code": "a"}, {"seed": "1", "code": "a"}])
    ['seed: process 0 has 0, process 2 has 1']
    """
    found = []
    for name in dict.fromkeys(name for facts in gathered for name in facts):
        values = [facts.get(name, "its default") for facts in gathered]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            found.append(f"{name}: process 0 has {values[0]}, process {other} has {values[other]}")
    return found
