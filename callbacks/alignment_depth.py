"""AlignmentDepth: does the policy differ from the base in the first tokens of a response, or in all of them?"""

from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.probe_session import ProbeSession, data_of, gathered_table, log, probe_batches
from callbacks.schedule import Scheduled
from tiltmeter.errors import UserError
from tiltmeter.pairs.batch import PreferenceBatch
from tiltmeter.states.chosen_tokens import ChosenTokens, shorten_rejected
from tiltmeter.states.observed_metrics import depth_metrics

_KEPT = "alignment_depth_base"


class AlignmentDepth(Scheduled):
    """Logs ``depth/first_token_share``: how much of KL(π ‖ π₀) over chosen responses lies in their first 5 tokens.

    ``depth/even_share`` beside it is what that would be if every token differed alike. π₀ is the model before the first step,
    whose final states are kept, also in checkpoints. A look takes a pass of its own, since the probe reads no whole responses.

    Args:
        n_pairs: of the probe, from its first on; all of a smaller one.
        every_n_steps: see :class:`~callbacks.schedule.Scheduled`.
    """

    def __init__(self, *, n_pairs: int = 32, every_n_steps: int | None = None) -> None:
        super().__init__(every_n_steps=every_n_steps)
        if n_pairs < 1:
            raise UserError(f"callbacks: n_pairs: expected at least 1, got {n_pairs}")
        self.n_pairs = n_pairs
        self._tokens = ChosenTokens([])
        self._batches: list[PreferenceBatch] = []
        self._base: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out what is read: chosen responses, and next to nothing of the rejected ones."""
        pairs = data_of(trainer).splits["probe"].pairs[: self.n_pairs]
        self._tokens = ChosenTokens([len(pair.chosen_ids) for pair in pairs])
        self._batches = probe_batches(trainer, shorten_rejected, rows=range(len(pairs)))
        super().on_train_start(trainer, pl_module)

    def on_resume(self, trainer: Trainer, module: LightningModule) -> None:
        """Later states are compared with the base's, which only the checkpoint has. Raises UserError: it hasn't."""
        if self._base is None or len(self._base) != len(self._tokens):
            raise UserError(
                f"callbacks: this checkpoint holds no states of the base model at the {len(self._tokens)} tokens that "
                "depth/first_token_share is of; resume with the callbacks that the run was started with, or with callbacks=none"
            )

    @torch.no_grad()
    def look(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep the base's states, or compare with them."""
        base = self._base if trainer.global_step else None
        read = partial(self._tokens.read, base=base, base_head=ProbeSession.of(trainer).head(module))
        with trainer.precision_plugin.forward_context():
            run = cast(Any, module).trained_policy.run
            found = [run(partial(read, batch.to(module.device))) for batch in self._batches]
        numbers, values = map(torch.cat, zip(*found, strict=True))
        table = gathered_table(numbers, values, len(self._tokens), trainer)
        if base is None:
            self._base = table
        elif trainer.is_global_zero:
            groups = data_of(trainer).splits["probe"].groups[: self.n_pairs]
            log(trainer, depth_metrics(self._tokens.by_response(table[:, 0]), groups))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what later looks are compared with."""
        ProbeSession.of(trainer).save(checkpoint)
        checkpoint[_KEPT] = self._base

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        ProbeSession.of(trainer).load(checkpoint)
        self._base = checkpoint.get(_KEPT)
