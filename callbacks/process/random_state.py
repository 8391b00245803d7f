"""RandomState: the random numbers of every process go on where they were when a run is resumed."""

from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from tiltmeter.random_state import random_state, set_random_state


class RandomState(Callback):
    """Keeps the generators of all processes in the checkpoint, in the order of their ranks.

    A run that goes on with another number of processes draws anew from its seed, and says so: the order of the pairs and
    what models are made to say don't depend on these generators, sums in another order differ in their last bits.
    """

    _loaded: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """State of all processes; a collective, as saving is."""
        return {"ranks": _gather(random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until the first step."""
        self._loaded = state_dict["ranks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything before the first step has drawn what it needed."""
        states, self._loaded = self._loaded, None
        if states is None:
            return
        if len(states) == trainer.world_size:
            set_random_state(states[trainer.global_rank])
        else:
            pl_module.print(
                f"Processes: {trainer.world_size} now, {len(states)} when the checkpoint was saved; the same pairs in the same "
                "order, sums in another one (losses equal to about 1e-5)"
            )


def _gather(own: dict[str, Any]) -> list[dict[str, Any]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    every: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    return every
