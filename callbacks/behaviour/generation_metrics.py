"""GenerationMetrics: base and policy complete the same held-out prompts, and scorers say what changed."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.behaviour.completions import as_plain, from_plain, gather_completions, prompts_of
from callbacks.behaviour.scoring import Scoring
from callbacks.probe_session import data_of
from callbacks.schedule import Scheduled
from tiltmeter.errors import UserError
from tiltmeter.models.generation import Decoding
from tiltmeter.scoring.behaviour import Completions, pair_up
from tiltmeter.scoring.scorer import Scorer


class GenerationMetrics(Scheduled):
    """All processes generate, each its share; the first one scores (:class:`~callbacks.behaviour.scoring.Scoring`).

    Args:
        scorers: by name; null leaves one out.
        decoding: null: greedy, 96 tokens.
        n_prompts: held-out prompts of the probe, the first so many.
        wait_seconds: how long the end of training waits for slow scorers; what is not there by then is missing.
        every_n_steps, epochs: see :class:`~callbacks.schedule.Scheduled`.
    """

    def __init__(
        self,
        *,
        scorers: Mapping[str, Scorer | None],
        decoding: Decoding | None = None,
        n_prompts: int = 128,
        wait_seconds: float = 300.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if n_prompts < 1 or wait_seconds < 0:
            raise UserError(f"callbacks: n_prompts from 1, wait_seconds from 0; got {n_prompts}, {wait_seconds}")
        self.decoding, self.n_prompts, self.wait_seconds = decoding or Decoding(), n_prompts, wait_seconds
        self.scoring = Scoring({name: scorer for name, scorer in scorers.items() if scorer is not None})
        self._base: Completions = {}
        self._decoded: dict[str, Any] = asdict(self.decoding)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        if trainer.is_global_zero:
            self.scoring.start(data_of(trainer))

    def look(self, trainer: Trainer, module: LightningModule) -> None:
        """Complete the prompts and have both models' completions scored."""
        prompts = prompts_of(data_of(trainer), self.n_prompts)
        said = gather_completions(trainer, module, prompts, self.decoding)
        self._base = self._base or said  # the first look is at the base model
        if trainer.is_global_zero:
            self.scoring.score(trainer, pair_up(prompts, self._base, said))

    def on_resume(self, trainer: Trainer, module: LightningModule) -> None:
        """The base model's completions come from the checkpoint: of these prompts, drawn as the policy's will be."""
        asked = prompts_of(data_of(trainer), self.n_prompts)
        if self._decoded != asdict(self.decoding) or not self._base.keys() >= {prompt.pair_id for prompt in asked}:
            raise UserError(
                "callbacks: this checkpoint holds no completions of the base model by this decoding and of as many prompts; resume "
                "with the callbacks and decoding that the run was started with, or with callbacks=none"
            )

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        super().on_train_batch_end(trainer, *args, **kwargs)
        self.scoring.collect(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.scoring.finish(trainer, wait_seconds=self.wait_seconds)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"decoding": self._decoded, "base": as_plain(self._base)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self._decoded, self._base = state_dict["decoding"], from_plain(state_dict["base"])
