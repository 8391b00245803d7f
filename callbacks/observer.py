"""The base of all callbacks that measure hidden states: the probe, read on a schedule."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.probe_session import ProbeSession, model_of
from callbacks.schedule import Scheduled
from tiltmeter.models.layers import resolve_sites
from tiltmeter.states.capture import ReadPoint
from tiltmeter.states.positions import Position, check_position
from tiltmeter.states.state_pair import StatePair


class Observer(Scheduled):
    """A callback that looks at the probe.

    Args:
        sites: ``all``, a site or several (``final_post_norm``, ``final_pre_norm``, ``layer_07``).
        positions: which tokens' hidden states (:mod:`tiltmeter.states.positions`).
        every_n_steps: see :class:`~callbacks.schedule.Scheduled`.
    """

    def __init__(
        self,
        *,
        sites: str | Sequence[str] = "all",
        positions: Sequence[Position] = ("prompt_last", "content"),
        every_n_steps: int | None = None,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps)
        self.sites = sites
        self.positions = tuple(check_position(position) for position in positions)

    def points(self, module: LightningModule, seen: StatePair) -> list[ReadPoint]:
        """The sites and positions that this callback asked for."""
        sites = resolve_sites(self.sites, model_of(module).config.num_hidden_layers)
        return [point for point in seen.base if point.site in sites and point.position in self.positions]

    def on_observation(self, trainer: Trainer, module: LightningModule, seen: StatePair) -> None:
        """Look; every process calls this."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Announce what will be read."""
        ProbeSession.of(trainer).want(self.sites, self.positions)

    def on_resume(self, trainer: Trainer, module: LightningModule) -> None:
        """Later readings are compared with the base's, which only the checkpoint has."""
        ProbeSession.of(trainer).check_base(module)

    def look(self, trainer: Trainer, module: LightningModule) -> None:
        """Read the probe, or take what another callback read at this step."""
        self.on_observation(trainer, module, ProbeSession.of(trainer).observe(trainer, module))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what later readings are compared with."""
        ProbeSession.of(trainer).save(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        ProbeSession.of(trainer).load(checkpoint)
