"""Sparse autoencoders of a frozen model's hidden states, trained on the texts of preference data as they are read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from datamodules.preference import Objective
from datamodules.splits import Split
from lightning_modules.base import LogProbModule
from lightning_modules.pair_metrics import PairResults
from tiltmeter.commands import command
from tiltmeter.errors import UserError, arguments_forwarded
from tiltmeter.files import write_text
from tiltmeter.metric_names import metric
from tiltmeter.models.hooks import hook_site
from tiltmeter.pairs.batch import PAD, PreferenceBatch, StepBatch
from tiltmeter.pairs.log_probs import run_backbone
from tiltmeter.sparse.autoencoder import SaeId, TopK, weights_of
from tiltmeter.sparse.dictionary_metrics import DictionaryStatistics, loss_recovered
from tiltmeter.sparse.files import write_sae
from tiltmeter.sparse.training import Learner, ShuffleBuffer, initialise

_NOT_MERGED = "an autoencoder reads hidden states, and no weight of the model is changed"
_NOTHING_TO_ACT_ON = {
    "lora": None,
    "vector": None,
    "sparse": None,
    "activation_checkpointing": False,
    "freeze_embeddings": True,
}
"""Options of other modules that would change nothing here, and their defaults."""


class SparseAutoencoderModule(LogProbModule):
    """Trains a TopK autoencoder on hidden states at one site; the model is frozen.

    The states are those of every token of chosen transcripts but the first, whose norm in many models is that of no other. They
    come through a buffer that mixes them, and a step learns from as many as it has read.

    Args:
        site: as :mod:`tiltmeter.models.layers` names it.
        width: number of features.
        k: most features active at a token.
        n_revived, auxiliary_weight, dead_after: see :class:`~tiltmeter.sparse.training.Learner`.
        buffer_rows: states that are mixed.
        first_directions: seed of the features before training.
        learning_rate and the rest: see :class:`~lightning_modules.base.LogProbModule`.
    """

    objective: Objective = "chosen"
    predict_prompt = True
    columns = ("nll", "nll_spliced", "nll_ablated", "target_tokens")
    writes_adapter = True

    def __init__(
        self,
        *,
        site: str = "layer_01",
        width: int = 512,
        k: int = 16,
        n_revived: int | None = None,
        auxiliary_weight: float = 1 / 32,
        dead_after: int = 100_000,
        buffer_rows: int = 16_384,
        first_directions: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, default in _NOTHING_TO_ACT_ON.items():
            if options.get(name, default) != default:
                raise UserError(f"module.{name}: the model is frozen here; leave it out")
        self.factory.not_merged = _NOT_MERGED
        self.keeps_base = True
        self.first_directions, self.buffer_rows = first_directions, buffer_rows
        self._learning = {"n_revived": n_revived, "auxiliary_weight": auxiliary_weight, "dead_after": dead_after}
        self._make = lambda id, d_model: TopK(id, d_model, width, k=k, subtracts_bias=True)
        self._prepare(self._make(SaeId(site), 1))  # wrong options are refused before there is a model
        self._site = site
        self._receive: Callable[[Tensor], Tensor | None] | None = None

    def _prepare(self, sae: TopK) -> None:
        self.sae, self.learner = sae, Learner(sae, **self._learning)  # type: ignore[arg-type]
        with arguments_forwarded({"ShuffleBuffer.n_rows": "SparseAutoencoderModule.buffer_rows"}):
            self.buffer = ShuffleBuffer(self.buffer_rows, sae.d_model, seed=self.first_directions)
        self.statistics = DictionaryStatistics(sae.d_model, sae.width)

    def on_model_built(self, model: PreTrainedModel) -> None:
        """Make the autoencoder for this very model, and the hook that reads and replaces the states of its site.

        Raises:
            UserError: several processes, weights of 16 bits, or a model without this site.
        """
        if self.trainer.world_size > 1:
            raise UserError("trainer.devices: a sparse autoencoder is trained in one process; set it to 1")
        if self.trainer.precision == "bf16-true":
            raise UserError("trainer.precision=bf16-true: features need weights of 32 bits; use bf16-mixed")
        hook_site(model, self._site, lambda hidden: None if self._receive is None else self._receive(hidden))
        model.requires_grad_(False)
        name = str(model.config._name_or_path)
        name = "" if Path(name).is_dir() else name
        self._prepare(self._make(SaeId(self._site, name, weights_of(model)), model.config.hidden_size))

    def trained_parameters(self) -> Iterator[Parameter]:
        """The autoencoder's."""
        return self.sae.parameters()

    def divisor(self, step: StepBatch) -> int:
        """Target tokens of the step."""
        return step.n_targets

    @contextmanager
    def _at_site(self, receive: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Inside, a function gets the states of the site, and what it returns takes their place."""
        self._receive = receive
        try:
            yield
        finally:
            self._receive = None

    @torch.no_grad()
    def states(self, batch: PreferenceBatch) -> Tensor:
        """[row, d_model] hidden states of every token of a batch but padding and the first of each text."""
        seen: list[Tensor] = []
        with self._at_site(seen.append):
            run_backbone(self.trained_policy.model, batch)
        return seen[0][_read(batch)]

    def training_step(self, step: StepBatch, batch_idx: int) -> None:
        """Read states, mix them, and take one optimizer step on as many."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert not isinstance(optimizer, list)
        assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
        rows = torch.cat([self.states(batch) for batch in step.micro_batches])
        if self.trainer.global_step == 0:
            initialise(self.sae, rows, seed=self.first_directions)
        rows = self.buffer.exchange(rows).to(self.sae.decoder_weight)
        with torch.autocast(self.device.type, enabled=False):
            loss = self.learner.loss(rows)
        self.manual_backward(loss.total)
        self.learner.before_step()
        norm = self._clip_gradients()
        reason = self.guard.refuse(loss=loss.total.item(), norm=float(norm))
        if reason is not None:
            optimizer.zero_grad()
            self.print(self.guard.skipped(self.trainer.global_step, reason, []))
        optimizer.step()
        self.learner.after_step()
        optimizer.zero_grad()
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        metrics: dict[str, Any] = {
            metric("sparse", "loss"): loss.total.detach(),
            metric("sparse", "unexplained"): loss.reconstruction.detach(),
            metric("sparse", "auxiliary"): loss.auxiliary.detach(),
            metric("sparse", "dead_now"): float(self.learner.dead.double().mean()),
            metric("train", "gradient_norm"): norm,
            metric("train", "learning_rate"): learning_rate,
            metric("alarm", "skipped_steps"): float(self.guard.n_refused),
        }
        self.log_dict(metrics | self.throughput.end_of_step(step, self.device), batch_size=step.n_pairs)

    @torch.no_grad()
    def pair_results(self, batch: PreferenceBatch, split: Split) -> PairResults:
        """Negative log-likelihoods of the chosen transcripts, in nats: as they are, reconstructed at the site, and with 0 there.

        What the autoencoder does to the states is added to :attr:`statistics`.
        """
        read = _read(batch)

        def reconstructed(hidden: Tensor) -> Tensor:
            rows = hidden[read]
            with torch.autocast(self.device.type, enabled=False):
                features = self.sae.encode(rows)
                made = self.sae.decode(features, like=rows)
            self.statistics.update(rows, features, made)
            return _replaced(hidden, read, made)

        nll = [-self.trained_policy(batch)]
        for change in (reconstructed, lambda hidden: _replaced(hidden, read, torch.zeros_like(hidden[read]))):
            with self._at_site(change):
                nll.append(-self.trained_policy(batch))
        columns = torch.stack([*(each.float() for each in nll), batch.target_counts.float()], dim=1)
        return PairResults((nll[0] * batch.weights).sum(), columns)

    def metrics_from_sums(self, sums: Tensor) -> dict[str, Tensor]:
        """Nothing under train/ or val/: the model itself does not change."""
        return {}

    def on_validation_epoch_start(self) -> None:
        """Begin to count anew."""
        self.statistics = DictionaryStatistics(self.sae.d_model, self.sae.width)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the dictionary on held-out texts."""
        super().on_validation_epoch_end()
        if self.trainer.sanity_checking or self.validation_table is None:
            return
        scored = self.validation_table[~self.validation_table.isnan().any(1)].double().sum(0)
        clean, spliced, ablated = (float(nll / scored[3]) for nll in scored[:3])
        found = self.statistics
        self.log_dict(
            {
                metric("sparse", "l0"): found.l0,
                metric("sparse", "explained_variance"): found.explained_variance,
                metric("sparse", "dead_share"): found.dead_share,
                metric("sparse", "ce_clean"): clean,
                metric("sparse", "ce_spliced"): spliced,
                metric("sparse", "ce_ablated"): ablated,
                metric("sparse", "ce_recovered"): loss_recovered(clean, spliced, ablated),
            },
            batch_size=len(self.validation_table),
        )

    def next_command(self, run_dir: Path) -> str:
        """The base steered by these features: there are no two models to compare."""
        return command("train.py", adapter="sparse", **{"module.sparse.sae": run_dir / "adapter"})

    def write_adapter(self, folder: Path) -> None:
        """Write the autoencoder, which is the result, and density.csv: how often its features were active on held-out texts."""
        write_sae(self.sae, folder, about={"steps": self.trainer.global_step, "trained_on": "chosen transcripts"})
        if self.statistics.n_rows:
            write_text(folder / "density.csv", self.statistics.density_table())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the next step depends on: the mixed rows, and for how long each feature was not active."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["sparse"] = {"buffer": self.buffer.state_dict(), "rows_without": self.learner.rows_without}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        super().on_load_checkpoint(checkpoint)
        self.buffer.load_state_dict(checkpoint["sparse"]["buffer"])
        self.learner.rows_without = checkpoint["sparse"]["rows_without"]


def _read(batch: PreferenceBatch) -> Tensor:
    """[row, token] tokens whose states are read."""
    return (batch.segments != PAD) & (batch.position_ids > 0)


def _replaced(hidden: Tensor, where: Tensor, rows: Tensor) -> Tensor:
    changed = hidden.clone()
    changed[where] = rows.to(hidden.dtype)
    return changed
