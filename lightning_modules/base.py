"""The common base of SFT and DPO: the optimizer step over micro-batches, exact means over pairs and processes, logging."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from peft import LoraConfig
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from datamodules.preference import Objective, PreferenceDataModule
from datamodules.splits import Split
from lightning_modules.model_factory import ModelFactory
from lightning_modules.optimizers import OptimizerChoice
from lightning_modules.pair_metrics import PairMetrics, PairResults, metrics_by_source
from lightning_modules.policy import EmptyBuilder, Policy, PolicyBuilder
from lightning_modules.schedule import (
    Schedule,
    check_number,
    learning_rate_factor,
    set_options_of_next_step,
    steps_of_fit,
)
from lightning_modules.step_guard import CURE, StepGuard, some
from lightning_modules.throughput import Throughput
from lightning_modules.weight_guard import check_weights, squared_norm
from tiltmeter.commands import command
from tiltmeter.errors import NumericalStop, UserError
from tiltmeter.metric_names import metric
from tiltmeter.models.lora import adapter_dropout, check_adapters
from tiltmeter.models.trained_vector import VectorOptions
from tiltmeter.pairs.batch import PreferenceBatch, StepBatch
from tiltmeter.pairs.verification import settle_packing, verify_layout, verify_no_randomness
from tiltmeter.sparse.steering import SparseOptions, SparseSteering, SparsityPenalty, response_tokens, sparse_steering
from tiltmeter.sparse.steering_file import STEERING_FILE, save_steering

_DIGESTED: tuple[Split, ...] = ("train", "val")


class LogProbModule(LightningModule):
    """Base of everything trained on sequence log-probs with whole optimizer steps as batches.

    Optimization is manual: a batch is an optimizer step, cut into micro-batches by length, and gradients are the exact
    mean over its pairs for any cut and any number of processes (Lightning's accumulation would average micro-batch means).

    Args:
        learning_rate: peak learning rate.
        weight_decay: of the optimizer.
        betas: of the optimizer; null: its own, (0.9, 0.999) of Adam's family.
        optimizer: ``adamw`` or another of torch.optim (``rmsprop``, ``adafactor``, ``sgd`` …), or ``adamw_8bit`` and others of
            bitsandbytes (paged ones on a GPU alone).
        optimizer_options: other options of its constructor, such as ``momentum`` or ``eps``.
        warmup_share: share of all steps with a rising learning rate.
        schedule: after warm-up: ``constant``, ``linear`` or ``cosine`` down to 0.
        gradient_clip_norm: largest gradient norm; null: no clipping.
        freeze_embeddings: keep token and position embeddings and the unembedding fixed, the paper's setting.
        chunk_tokens: tokens whose logits exist at a time; null: 1,024, fewer above 32,768 words.
        lora: train low-rank adapters instead of the weights (``adapter=lora``); null: the weights.
        vector: train one constant vector instead of them (``adapter=vector``); null: no vector.
        sparse: train a steering of sparse features instead of them (``adapter=sparse``), with its penalty in the loss; null: none.
        activation_checkpointing: keep only each block's input for the backward pass and compute the rest again: less
            memory, about a third more time, the same numbers to the last bit on a CPU.
        max_skipped_steps, spike_sigmas: steps that aren't learned from (:class:`~lightning_modules.step_guard.StepGuard`).
        compile_blocks: compile every decoder block with torch.compile; float32 log-probs agree to 1e-5, relative.
    """

    objective: Objective
    """Objective that the data module lays its batches out for; so do :attr:`predict_prompt` and :attr:`packs`."""
    predict_prompt = False
    packs: bool | None = None
    """Whether batches are packed; None until the model is there to say whether it can."""
    writes_adapter = False
    """Whether the result is what :meth:`write_adapter` writes."""
    columns: tuple[str, ...]
    """Names of the per-pair figures, which are also the metric names behind the stage."""

    def __init__(
        self,
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] | None = None,
        optimizer: str = "adamw",
        optimizer_options: Mapping[str, Any] | None = None,
        warmup_share: float = 0.1,
        schedule: Schedule = "linear",
        gradient_clip_norm: float | None = 1.0,
        freeze_embeddings: bool = True,
        chunk_tokens: int | None = None,
        lora: LoraConfig | None = None,
        vector: VectorOptions | None = None,
        sparse: SparseOptions | None = None,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
        max_skipped_steps: int = 3,
        spike_sigmas: float | None = 6.0,
    ) -> None:
        super().__init__()
        self.factory = ModelFactory(
            freeze_embeddings=freeze_embeddings,
            chunk_tokens=chunk_tokens,
            lora=lora,
            vector=vector,
            sparse=sparse,
            activation_checkpointing=activation_checkpointing,
            compile_blocks=compile_blocks,
        )
        self.lora = lora
        self.keeps_base = not (lora is None and vector is None and sparse is None)
        """Whether the base's weights are kept as they are, so that it is there beside the policy at any time."""
        check_number("learning_rate", learning_rate, 0, math.inf, above=True)
        check_number("weight_decay", weight_decay, 0, math.inf)
        check_number(
            "gradient_clip_norm", 1 if gradient_clip_norm is None else gradient_clip_norm, 0, math.inf, above=True
        )
        check_number("max_skipped_steps", max_skipped_steps, 0, math.inf)
        check_number("spike_sigmas", 1 if spike_sigmas is None else spike_sigmas, 0, math.inf, above=True)
        for beta in betas or ():
            check_number("betas", beta, 0, 1)
        if schedule not in ("constant", "linear", "cosine"):
            raise UserError(f"module.schedule: expected constant, linear or cosine, got {schedule}")
        check_number("warmup_share", warmup_share, 0, 1.001)
        self.automatic_optimization = False
        self.optimizer = OptimizerChoice(optimizer, learning_rate, weight_decay, betas, optimizer_options or {})
        self.warmup_share = warmup_share
        self.schedule: Schedule = schedule
        self.gradient_clip_norm = gradient_clip_norm
        self.guard = StepGuard(max_skipped_steps=max_skipped_steps, spike_sigmas=spike_sigmas)
        self.throughput = Throughput()
        self.metrics = PairMetrics()
        self.sparsity = None if sparse is None else SparsityPenalty(sparse.sparsity)
        self.writes_adapter = self.writes_adapter or sparse is not None
        self.policy: Policy | None = None
        self.reference_cache: Path | None = None
        self.validation_table: Tensor | None = None
        """[row of the validation split, column] of the last validation, the same on every process; NaN: not scored."""
        self.validated_at_step = 0
        self._norm_before = math.nan
        self._said_clamped = False

    @abstractmethod
    def pair_results(self, batch: PreferenceBatch, split: Split) -> PairResults:
        """Objective and per-pair figures of one micro-batch."""

    def metrics_from_sums(self, sums: Tensor) -> dict[str, Tensor]:
        """Metric → value from [column + 1] sums over pairs, the last of which counts them. Default: means over pairs."""
        return {name: sums[i] / sums[-1] for i, name in enumerate(self.columns)}

    def trained_parameters(self) -> Iterator[Parameter]:
        """Parameters that are trained."""
        return (p for p in self.trained_policy.parameters() if p.requires_grad)

    def next_command(self, run_dir: Path) -> str:
        """Command that a finished run is gone on with."""
        return command("analyze.py", run=run_dir)

    def write_adapter(self, folder: Path) -> None:
        """Write what was trained beside the model into an empty folder; called where :attr:`writes_adapter` says so."""
        assert self.steering is not None
        assert self.factory.sparse is not None
        save_steering(folder / STEERING_FILE, self.steering, self.factory.sparse)

    @property
    def steering(self) -> SparseSteering | None:
        """The steering of sparse features that is trained; None: none is."""
        return None if self.sparsity is None else sparse_steering(self.trained_policy.model)

    def on_model_built(self, model: PreTrainedModel) -> None:
        """Called with the model as it is before training, on every process; it may be sharded and have adapters."""

    @property
    def data(self) -> PreferenceDataModule:
        """The data module of the current fit."""
        return cast(PreferenceDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]

    @property
    def trained_policy(self) -> Policy:
        """The model, once built."""
        assert self.policy is not None, "configure_model() comes first"
        return self.policy

    def attach_model(
        self, build: PolicyBuilder, build_empty: EmptyBuilder = lambda: None, *, reference_cache: Path | None = None
    ) -> None:
        """Say how the model is built; it is built in :meth:`configure_model`, once the process group exists.

        Args:
            build: makes it whole.
            build_empty: makes it without weights, to be sharded before each process reads its share of them; None from it:
                not possible, and every process makes it whole first.
            reference_cache: folder of log-probs of references, shared by all runs, for objectives that have one; None: every
                run computes its own.
        """
        self.factory.build, self.factory.build_empty = build, build_empty
        self.reference_cache = reference_cache

    def attach_reference(self, build: PolicyBuilder, build_empty: EmptyBuilder = lambda: None) -> None:
        """Say that rewards are measured by another model than the start of training; arguments as of :meth:`attach_model`.

        Raises:
            UserError: this module has no reference.
        """
        raise UserError("reference.name_or_path: this module has no reference; leave it out, or take module=dpo")

    def configure_model(self) -> None:
        """Make the model and check what it computes; does nothing the second time."""
        if self.policy is not None:
            return
        is_sharded = self.device_mesh is not None
        if is_sharded:
            self.optimizer.check_sharding()
        policy = self.factory.make(self.trainer, self.device_mesh)
        with (
            torch.device(policy.model.device),
            self.trainer.precision_plugin.forward_context() if is_sharded else nullcontext(),
        ):
            policy.run(self._check_model)
        if isinstance(policy, FSDPModule):
            policy.reshard()  # FSDP2 leaves the root whole after a forward; the optimizer takes the shards
        self.on_model_built(policy.model)
        self.factory.speed_up(policy.model)
        self.policy = policy
        self._norm_before = 0.0 if self.sparsity else self._weight_norm()  # a steering grows from next to nothing
        self.policy.train()  # no dropout but in adapters (adapter_dropout); train mode only lets activation checkpointing work

    def _check_model(self, model: PreTrainedModel) -> None:
        """Settle packing and verify what is computed, on the model where it is: whole, or sharded and on all processes alike."""
        data = self.data
        verify_no_randomness(model)
        self.packs = settle_packing(model, data.active_layout, data.packed, max_length=data.max_length)
        if data.layout != data.active_layout:  # in which the probe's pairs are laid out
            verify_layout(model, data.layout, packed=self.packs)
        if self.lora is not None:
            check_adapters(model)

    def check_weights(self) -> None:
        """Refuse trained weights that are not finite or exploded, LoRA's adapters likewise; every process must call this.

        Raises:
            NumericalStop: they are.
        """
        check_weights(self._weight_norm(), before=self._norm_before, step=self.trainer.global_step)

    def _weight_norm(self) -> float:
        total = squared_norm(self.trained_parameters())
        return math.sqrt(float(total if self.device_mesh is None else self._reduce(total)))

    @abstractmethod
    def divisor(self, step: StepBatch) -> int:
        """Number that the step's summed objective is divided by."""

    def configure_optimizers(self) -> Any:
        """The optimizer, with warm-up and a schedule over all steps."""
        optimizer = self.optimizer.make(p for p in self.parameters() if p.requires_grad)
        total = self.total_steps()

        def factor(step: int) -> float:  # a function, which checkpoints leave out: a resumed run may take more steps
            return learning_rate_factor(step, total_steps=total, warmup_share=self.warmup_share, schedule=self.schedule)

        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor)}

    def total_steps(self) -> int:
        """Optimizer steps of the whole fit."""
        return steps_of_fit(self.trainer, self.data.steps_per_epoch)

    def on_train_start(self) -> None:
        """Put this run's options in force, where a checkpoint has restored the optimizer's of before; start the clock."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert not isinstance(optimizer, list)
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        set_options_of_next_step(optimizer.optimizer, scheduler)
        self.throughput.start()

    def on_validation_end(self) -> None:
        """Validation is no part of a training step's time."""
        self.throughput.start()

    def on_train_batch_start(self, batch: StepBatch, batch_idx: int) -> None:
        """Log at the number of steps taken, of which Lightning loses count when a run goes on inside an epoch."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def training_step(self, step: StepBatch, batch_idx: int) -> None:
        """One optimizer step: all micro-batches backward, one all-reduce, clip, update unless the numbers are wrong."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert not isinstance(optimizer, list)
        assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
        scale = self.trainer.world_size / self.divisor(step)  # DDP and FSDP2 average gradients over processes
        tables: list[Tensor] = []
        seen: list[tuple[Tensor, Tensor]] = []
        self._begin_penalty(step)
        with adapter_dropout(self.trained_policy.model, 0.0 if self.lora is None else self.lora.lora_dropout):
            for i, batch in enumerate(step.micro_batches):
                is_last = i == len(step.micro_batches) - 1
                with nullcontext() if is_last else self._no_gradient_sync():
                    results = self.pair_results(batch, "train")
                    self.manual_backward(self._penalised(results.objective * scale, batch))
                tables.append(self.metrics.sums_of_batch(self.data, "train", batch, results.columns))
                seen.append((batch.pair_index, results.columns))
        norm = self._clip_gradients()
        sums, n_computed, n_padding, mean_norm = self._reduce_with_counts(torch.stack(tables).sum(0), step, norm)
        metrics: dict[str, Any] = metrics_by_source(sums, self.data.sources, "train", self.metrics_from_sums)
        reason = self.guard.refuse(loss=float(metrics[metric("train", "loss")]), norm=float(mean_norm))
        if reason is not None:
            optimizer.zero_grad()  # optimizers pass over weights without a gradient; the step and its learning rate count
            self.print(self.guard.skipped(self.trainer.global_step, reason, self._not_finite(seen)))
        optimizer.step()
        self._clamp_thresholds()
        optimizer.zero_grad()
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        metrics |= {metric("train", "gradient_norm"): norm, metric("train", "learning_rate"): learning_rate}
        metrics[metric("alarm", "skipped_steps")] = float(self.guard.n_refused)
        metrics |= self._steered()
        metrics[metric("throughput", "padding_share")] = n_padding / n_computed
        if self.data.active_layout == "shared_prefix":
            n_unshared = step.n_tokens + step.n_prompt_tokens
            metrics[metric("throughput", "saved_prompt_share")] = step.n_prompt_tokens / n_unshared
        self.log_dict(metrics | self.throughput.end_of_step(step, self.device), batch_size=step.n_pairs)

    def validation_step(self, step: StepBatch, batch_idx: int) -> None:
        """Collect per-pair figures; they are averaged over the whole split at the end."""
        for batch in step.micro_batches:
            self.metrics.collect(batch, self.pair_results(batch, "val").columns)

    def on_validation_epoch_end(self) -> None:
        """Log means over all held-out pairs, each counted once, whatever batches and processes."""
        n_rows = len(self.data.splits["val"].pairs)
        table = self._reduce(self.metrics.collected(n_rows, len(self.columns), self.device))
        if self.trainer.sanity_checking:
            return
        if not table[table[:, -1] > 0].isfinite().all(1).any():
            raise NumericalStop(
                f"step {self.trainer.global_step}: the loss of every held-out pair is not finite "
                f"({some([record.pair_id for record in self.data.splits['val'].records])}), so the weights are of no use any "
                f"more. {CURE}"
            )
        self.validation_table = table[:, :-1].masked_fill(table[:, -1:] == 0, torch.nan).cpu()
        self.validated_at_step = self.trainer.global_step
        sums = self.metrics.sums_of_table(self.data, "val", table)
        self.log_dict(metrics_by_source(sums, self.data.sources, "val", self.metrics_from_sums), batch_size=n_rows)

    def on_train_end(self) -> None:
        """Weights that went wrong in the last steps, too few for the guard to stop, are no result."""
        self.check_weights()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which token ids the run was trained on; leave out weights that aren't trained; refuse those gone wrong."""
        self.check_weights()
        checkpoint["data_digests"] = self._data_digests()
        checkpoint["step_guard"] = self.guard.state_dict()
        if self.keeps_base and self.device_mesh is None:
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with other data, and put Lightning's counts right.

        It counts an epoch that ended at ``max_steps`` as processed, so a run that is to take more steps would take one epoch
        too few. And a run that was resumed at the end of an epoch never counts the next one as started, so a run resumed from
        its checkpoints would count their batches anew and validate late.
        """
        _correct_counts(checkpoint["loops"]["fit_loop"], self.data.steps_per_epoch)
        if checkpoint.get("data_digests") != self._data_digests():
            raise UserError(
                "ckpt_path: the checkpoint was trained on other data or another tokenisation; resume with the same data options"
            )
        self.guard.load_state_dict(checkpoint["step_guard"])
        if self.keeps_base and self.device_mesh is None:
            trained = {name for name, p in self.named_parameters() if p.requires_grad}
            if trained != set(checkpoint["state_dict"]):
                raise UserError(
                    "ckpt_path: the checkpoint holds the weights of other adapters; it belongs to another run"
                )
            self.strict_loading = False  # weights that aren't trained stay as they were built

    def _data_digests(self) -> dict[str, str]:
        return {split: self.data.digest(split) for split in _DIGESTED}

    def _reduce_with_counts(self, sums: Tensor, step: StepBatch, norm: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over processes, with the tokens computed, the padding among them and the mean gradient norm, in one message.

        The norm is every process's own and could differ in the last bit, which no decision may depend on.
        """
        counts = sums.new_tensor([step.n_computed, step.n_padding, norm.item() / self.trainer.world_size])
        reduced = self._reduce(torch.cat([sums.flatten(), counts]))
        return reduced[:-3].view_as(sums), reduced[-3], reduced[-2], reduced[-1]

    def _begin_penalty(self, step: StepBatch) -> None:
        if self.sparsity is not None:
            own = sum(response_tokens(batch).sum() for batch in step.micro_batches)
            self.sparsity.begin(int(self._reduce(torch.as_tensor(own, device=self.device))))

    def _penalised(self, objective: Tensor, batch: PreferenceBatch) -> Tensor:
        """With the micro-batch's part of the penalty on steering; DDP averages gradients over processes."""
        if self.sparsity is None or self.steering is None:
            return objective
        return objective + self.trainer.world_size * self.sparsity.of(self.steering, batch)

    def _clamp_thresholds(self) -> None:
        line = None if self.steering is None else self.steering.clamp_thresholds()
        if line is not None and not self._said_clamped:
            self.print(line)
            self._said_clamped = True

    def _steered(self) -> dict[str, Tensor]:
        means = {} if self.sparsity is None else self.sparsity.means()
        return {metric("sparse", f"steering_{name}"): self._reduce(mean) for name, mean in means.items()}

    def _clip_gradients(self) -> Tensor:
        parameters = [p for p in self.parameters() if p.grad is not None]
        limit = math.inf if self.gradient_clip_norm is None else self.gradient_clip_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _no_gradient_sync(self) -> AbstractContextManager[Any]:
        """DDP exchanges gradients once a step; FSDP2 reduces each micro-batch, since it keeps no whole gradient."""
        wrapped = self.trainer.strategy.model
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def _not_finite(self, seen: Sequence[tuple[Tensor, Tensor]]) -> list[str]:
        """Ids of the training pairs, of all processes, with a figure that isn't finite."""
        records = self.data.splits["train"].records
        marked = torch.zeros(len(records), device=self.device)
        for rows, columns in seen:
            marked[rows[~columns.isfinite().all(1)]] = 1
        return [records[row].pair_id for row in self._reduce(marked).nonzero()[:, 0].tolist()]

    def _reduce(self, tensor: Tensor) -> Tensor:
        """Sum over processes."""
        if self.trainer.world_size == 1:
            return tensor
        return cast(Tensor, self.trainer.strategy.reduce(tensor, reduce_op="sum"))


def _correct_counts(loop: dict[str, Any], steps_per_epoch: int) -> None:
    batches = loop["epoch_loop.batch_progress"]
    for counts in loop["epoch_progress"].values():
        counts["processed"] = counts["completed"]
        n_batches = counts["completed"] * steps_per_epoch
        is_between = batches["is_last_batch"] and batches["total"]["completed"] == n_batches
        counts["ready"] = counts["started"] = counts["completed"] + (0 if is_between else 1)
