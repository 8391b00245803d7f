"""When the probe is looked at while a model trains: the base of all callbacks that measure hidden states."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.observation import Observation, ProbeSession
from tiltmeter.capture import ReadPoint
from tiltmeter.errors import UserError
from tiltmeter.layers import resolve_sites
from tiltmeter.positions import Position, check_position


class Observer(Callback):
    """A callback that looks at the probe before training, at the end of every epoch and, if asked, every few steps.

    Args:
        sites: ``all``, a site or several (``final_post_norm``, ``final_pre_norm``, ``layer_07``).
        positions: which tokens' hidden states (:mod:`tiltmeter.positions`).
        every_n_steps: look after so many optimizer steps too; null: at the start and at the ends of epochs.
    """

    def __init__(
        self,
        *,
        sites: str | Sequence[str] = "all",
        positions: Sequence[Position] = ("prompt_last",),
        every_n_steps: int | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"callbacks: every_n_steps: expected at least 1 or null, got {every_n_steps}")
        self.sites = sites
        self.positions = tuple(check_position(position) for position in positions)
        self.every_n_steps = every_n_steps
        self._seen: int | None = None

    def points(self, seen: Observation) -> list[ReadPoint]:
        """The sites and positions that this callback asked for."""
        sites = resolve_sites(self.sites, seen.n_layers)
        return [point for point in seen.base if point.site in sites and point.position in self.positions]

    def on_observation(self, trainer: Trainer, module: LightningModule, seen: Observation) -> None:
        """Look; every process calls this."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Announce what will be read."""
        ProbeSession.of(trainer).want(self.sites, self.positions)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The base model, before the first step."""
        if trainer.global_step == 0:
            self._look(trainer, pl_module)
        else:
            ProbeSession.of(trainer).check_base(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every few steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of an epoch."""
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        if self._seen != trainer.global_step:
            self._seen = trainer.global_step
            self.on_observation(trainer, module, ProbeSession.of(trainer).observe(trainer, module))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what later readings are compared with."""
        ProbeSession.of(trainer).save(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        ProbeSession.of(trainer).load(checkpoint)
