"""Direct preference optimisation and its relatives, with a reference that is computed once."""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from rich.progress import track
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from datamodules.preference import Objective
from datamodules.splits import Split
from lightning_modules.base import LogProbModule
from lightning_modules.model_factory import ModelFactory
from lightning_modules.pair_metrics import PairResults
from lightning_modules.policy import EmptyBuilder, Policy, PolicyBuilder
from lightning_modules.reference import MicroBatches, cached_reference
from lightning_modules.schedule import check_number
from tiltmeter.errors import UserError
from tiltmeter.models.lora import adapters_disabled, plain_state
from tiltmeter.models.trained_vector import trained_vector
from tiltmeter.pairs.batch import PreferenceBatch, StepBatch
from tiltmeter.pairs.preference_losses import PAIR_METRICS, PairLogProbs, chosen_nll, make_preference_loss
from tiltmeter.pairs.reference_cache import ReferenceCache, forward_identity, hash_weights
from tiltmeter.pairs.router_loss import router_coefficient
from tiltmeter.pairs.verification import settle_packing, verify_no_randomness


class DPOModule(LogProbModule):
    """Minimises a preference loss averaged over the pairs of the step.

    The reference is the model as it is before the first step, or another one (:meth:`attach_reference`). Its log-probs are computed
    once, by the same code in the same precision as training, kept by row of the data set and saved in checkpoints, so that no
    second model is in memory while training and a resumed run never takes its trained weights for the reference.

    Args:
        loss: a name of :data:`~tiltmeter.pairs.preference_losses.PREFERENCE_LOSSES`.
        beta, label_smoothing, gamma_beta_ratio: options of the loss; null takes its default, one that the loss does
            not have is refused.
        sft_weight: of the negative log-likelihood of the chosen response per token, added to the loss of each pair (RPO).
        router_aux_loss: weight of the load-balancing loss of a mixture of experts; null: the model's own
            (``router_aux_loss_coef``); 0: none.
        learning_rate and the rest: see :class:`~lightning_modules.base.LogProbModule`.
    """

    objective: Objective = "preference"
    columns: tuple[str, ...] = PAIR_METRICS

    def __init__(
        self,
        *,
        loss: str = "sigmoid",
        beta: float | None = None,
        label_smoothing: float | None = None,
        gamma_beta_ratio: float | None = None,
        sft_weight: float = 0.0,
        router_aux_loss: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_number("sft_weight", sft_weight, 0, math.inf)
        self._both_signs = self.factory.vector is not None and self.factory.vector.both_signs
        if self._both_signs and self.factory.activation_checkpointing:
            raise UserError(
                "module.vector.both_signs: not with module.activation_checkpointing=true, which computes blocks again when the "
                "vector has its own sign; leave one of the two out"
            )
        self.loss = make_preference_loss(
            loss, sft_weight, beta=beta, label_smoothing=label_smoothing, gamma_beta_ratio=gamma_beta_ratio
        )
        if sft_weight:
            self.columns = (*PAIR_METRICS, "sft_loss")
        check_number("router_aux_loss", router_aux_loss or 0, 0, math.inf)
        self.router_aux_loss = None if router_aux_loss is None else float(router_aux_loss)
        self._router_weight = 0.0
        self._cache: ReferenceCache | None = None
        self._other_reference: ModelFactory | None = None
        self._scored: list[Policy] = []  # in a list, since a module that is an attribute would be trained and saved
        self.reference: dict[str, Tensor] = {}
        """Split → [row, 2] log π₀ of chosen and rejected, nats, float32 (float64 for a float64 model)."""

    def attach_reference(self, build: PolicyBuilder, build_empty: EmptyBuilder = lambda: None) -> None:
        """Take another model than the one that training starts from as the reference; arguments as of :meth:`attach_model`."""
        self._other_reference = self.factory.plain()
        self._other_reference.build, self._other_reference.build_empty = build, build_empty

    def on_model_built(self, model: PreTrainedModel) -> None:
        """Open the cache of this very model, as it computes here."""
        self._settle_router_loss(model)
        if self._other_reference is None:
            self._open_cache(model)

    def _settle_router_loss(self, model: PreTrainedModel) -> None:
        weight = router_coefficient(model, self.router_aux_loss)
        if not weight:
            return
        if (
            self.device_mesh is not None
        ):  # routers' outputs are none of their blocks', so FSDP2 would free weights that they need
            if self.router_aux_loss:
                raise UserError("module.router_aux_loss: not with trainer=fsdp; leave it out or take trainer=ddp")
            self.print("Experts: no load-balancing loss, which trainer=fsdp can't have (module.router_aux_loss)")
            return
        self._router_weight = weight
        self.columns = (*self.columns, "router_loss")
        self.print(f"Experts: load-balancing loss × {weight:g} beside the preference loss (module.router_aux_loss)")

    def _open_cache(self, model: PreTrainedModel) -> None:
        if self.reference_cache is not None:
            depends_on = {
                "weights": hash_weights(plain_state(model), is_first=self.trainer.is_global_zero),
                "precision": self.trainer.precision,
                "layout": f"{self.data.active_layout}{' packed' if self.packs else ''}",
                "chunk_tokens": str(self.factory.chunk_tokens),
                "compiled": str(self.factory.compile_blocks),
                "sharded": str(self.device_mesh is not None),
                **forward_identity(model, self.trainer.strategy.root_device),
            }
            self._cache = ReferenceCache(self.reference_cache, depends_on)

    def divisor(self, step: StepBatch) -> int:
        """Pairs of the step."""
        return step.n_pairs

    def on_fit_start(self) -> None:
        """Find or compute the reference log-probs that were not loaded from a checkpoint.

        Also for losses without a reference: rewards are always β·log(π/π₀). A sharded checkpoint is loaded after this, so
        the weights here are still the reference's.
        """
        missing: dict[Split, Sequence[int]] = {}
        for split, rows in self._needed_rows().items():
            known = self.reference.get(split)
            missing[split] = rows if known is None else [row for row in rows if known[row].isnan().any()]
        with self._scored_by(self._reference_factory() if any(missing.values()) else None):
            for split, rows in missing.items():
                if rows:
                    found, known = self._find_reference(split, rows), self.reference.get(split)
                    self.reference[split] = (
                        found if known is None else torch.where(known.isnan(), found.to(known), known)
                    )
        self.reference = {split: table.to(self.device) for split, table in self.reference.items()}

    def _reference_factory(self) -> ModelFactory | None:
        """Factory of the reference; None: the model in training still is it, or was loaded and is with its adapters off."""
        resumes_whole = bool(self.reference) and not self.keeps_base
        return self._other_reference or (self.factory.plain() if resumes_whole else None)

    @contextmanager
    def _scored_by(self, factory: ModelFactory | None) -> Iterator[None]:
        """Inside, reference log-probs are those of a model that is made for it and dropped again; None: of the one in training."""
        if factory is None:
            yield
            return
        policy = factory.make(self.trainer, self.device_mesh)
        if self.device_mesh is None:
            policy = cast(Policy, self.trainer.precision_plugin.convert_module(policy)).to(self.device)
        with torch.device(self.device), self.trainer.precision_plugin.forward_context():
            policy.run(self._check_reference)
        if isinstance(policy, FSDPModule):
            policy.reshard()
        if factory is self._other_reference:
            self._open_cache(policy.model)
        factory.speed_up(policy.model)
        self._scored.append(policy)
        try:
            yield
        finally:
            self._scored.clear()

    def _check_reference(self, model: PreTrainedModel) -> None:
        verify_no_randomness(model)
        settle_packing(model, self.data.active_layout, self.packs, max_length=self.data.max_length)

    def _needed_rows(self) -> dict[Split, Sequence[int]]:
        needed: dict[Split, Sequence[int]] = {"train": self.data.rows_of_first_steps(self.total_steps())}
        if n_held_out := len(self.data.splits["val"].pairs):
            needed["val"] = range(n_held_out)
        return needed

    def _find_reference(self, split: Split, rows: Sequence[int]) -> Tensor:
        table, line = cached_reference(
            self.data.pairs_of(split),
            rows,
            cache=self._cache,
            compute=partial(self.sequence_log_probs_of, split),
            micro_batches=partial(self.data.micro_batches, split),
            recompute=partial(self._log_probs_in, split),
            share=self.trainer.strategy.broadcast,
            is_first=self.trainer.is_global_zero,
            first_step=self.data.rows_of_first_steps(1) if split == "train" and self.trainer.global_step == 0 else (),
        )
        self.print(f"{line} ({split})")
        return table.to(self._log_prob_dtype)

    @property
    def _log_prob_dtype(self) -> torch.dtype:
        return torch.promote_types(self.trained_policy.model.dtype, torch.float32)

    def sequence_log_probs_of(self, split: Split, rows: Sequence[int]) -> Tensor:
        """[row, 2] log-probs of chosen and rejected under the current weights, on every process; NaN for rows not asked for.

        With LoRA: under the weights without their adapters, which is the reference at any time.
        """
        loader = self.data.loader(split, rows=rows)
        quiet = not (self.trainer.is_global_zero and self.trainer.progress_bar_callback and sys.stdout.isatty())
        steps = track(loader, f"reference log-probs ({split})", transient=True, disable=quiet)
        known = self._reduce(self._log_probs_by_row(split, steps, others=0.0))
        table = torch.full_like(known, torch.nan)
        table[list(rows)] = known[list(rows)]
        return table

    def _log_probs_in(self, split: Split, micro_batches: MicroBatches) -> Tensor:
        """Reference log-probs of given micro-batches, all of them on this process."""
        return self._log_probs_by_row(split, [self.data.step_of(split, micro_batches)], others=torch.nan)

    @torch.no_grad()
    def _log_probs_by_row(self, split: Split, steps: Iterable[StepBatch], *, others: float) -> Tensor:
        """[row, 2] log-probs of this process's batches, and what is said for other rows."""
        dtype = self._log_prob_dtype
        table = torch.full((len(self.data.splits[split].pairs), 2), others, device=self.device, dtype=dtype)
        policy = self._scored[0] if self._scored else self.trained_policy
        with adapters_disabled(policy.model):
            for step in steps:
                for batch in step.to(self.device).micro_batches:
                    with self.trainer.precision_plugin.forward_context():
                        logps = policy(batch).to(dtype)
                    real = batch.weights > 0
                    table[batch.pair_index[real]] = logps.view(2, -1).T[real]
        return table

    def pair_results(self, batch: PreferenceBatch, split: Split) -> PairResults:
        """Preference loss and TRL's reward metrics; rewards are β·log(π/π₀) whatever the loss."""
        policy = self.trained_policy
        logps, router_loss = policy.with_router_loss(batch) if self._router_weight else (policy(batch), None)
        chosen, rejected = logps.chunk(2)
        chosen_tokens, rejected_tokens = batch.target_counts.chunk(2)
        reference_chosen, reference_rejected = self.reference[split][batch.pair_index].unbind(1)
        pairs = PairLogProbs(chosen, rejected, reference_chosen, reference_rejected, chosen_tokens, rejected_tokens)
        losses = self.loss(pairs)
        if self._both_signs:
            losses = (losses + self.loss(self._turned(batch, pairs))) / 2
        with torch.no_grad():
            rewards = [self.loss.beta * log_ratio for log_ratio in pairs.log_ratios()]
            margins = rewards[0] - rewards[1]
            figures = [losses, *rewards, margins, (margins > 0).float(), chosen, rejected]
            if self.loss.sft_weight:
                figures.append(chosen_nll(pairs))
            if router_loss is not None:
                figures.append(router_loss.expand_as(losses))
            columns = torch.stack([f.detach().float() for f in figures], dim=1)
        if router_loss is not None:
            losses = (
                losses + self._router_weight * router_loss
            )  # of the micro-batch, so that each pair brings its own's
        return PairResults((losses * batch.weights).sum(), columns)

    def _turned(self, batch: PreferenceBatch, pairs: PairLogProbs) -> PairLogProbs:
        """The same pairs with the opposite vector, and with the rejected response in the place of the chosen one."""
        policy = self.trained_policy
        vector = trained_vector(policy.model)
        assert vector is not None
        with vector.turned():
            chosen, rejected = policy(batch).chunk(2)
        reference = pairs.reference_rejected, pairs.reference_chosen
        return PairLogProbs(rejected, chosen, *reference, pairs.rejected_tokens, pairs.chosen_tokens)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the reference with the run."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference_log_probs"] = {split: table.cpu() for split, table in self.reference.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the reference of the run that is resumed; rows that it lacks and this process knows stay."""
        super().on_load_checkpoint(checkpoint)
        for split, kept in checkpoint["reference_log_probs"].items():
            table = kept.to(self.device)
            known = self.reference.get(split)
            self.reference[split] = table if known is None else torch.where(table.isnan(), known.to(table), table)
