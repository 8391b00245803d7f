"""How the model that is trained comes to be: built or read sharded, frozen, adapted, compiled, checked before the first step."""

import math
from contextlib import nullcontext

import torch
from peft import LoraConfig
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lightning_modules.pair_metrics import PairMetrics
from lightning_modules.policy import (
    EmptyBuilder,
    Policy,
    PolicyBuilder,
    checkpoint_activations,
    compile_blocks,
    freeze_embeddings,
    shard,
)
from lightning_modules.schedule import check_number
from lightning_modules.weight_guard import check_weights, squared_norm
from tiltmeter.models.cpu_linear import onednn_is_faster, use_fast_linear
from tiltmeter.models.lora import check_adapters, check_lora, insert_adapters, reads_weights
from tiltmeter.models.sharded_weights import EmptyModel
from tiltmeter.pairs.verification import settle_packing, verify_layout, verify_no_randomness


class ModelBuilding(PairMetrics):
    """A Lightning module whose policy is made in ``configure_model``; its options are explained where they are set.

    Raises:
        UserError: options that don't go together.
    """

    def __init__(
        self,
        *,
        freeze_embeddings: bool,
        chunk_tokens: int | None,
        lora: LoraConfig | None,
        activation_checkpointing: bool,
        compile_blocks: bool,
    ) -> None:
        super().__init__()
        check_number("chunk_tokens", 1 if chunk_tokens is None else chunk_tokens, 1, math.inf)
        if lora is not None:
            check_lora(lora, freeze_embeddings=freeze_embeddings)
        self.freeze_embeddings, self.chunk_tokens, self.lora = freeze_embeddings, chunk_tokens, lora
        self.activation_checkpointing, self.compile_blocks = activation_checkpointing, compile_blocks
        self.policy: Policy | None = None
        self._norm_before = math.nan
        self._build_model: PolicyBuilder | None = None
        self._build_empty: EmptyBuilder = lambda: None

    def attach_model(self, build: PolicyBuilder, build_empty: EmptyBuilder = lambda: None) -> None:
        """Say how the model is built; it is built in :meth:`configure_model`, once the process group exists.

        Args:
            build: makes it whole.
            build_empty: makes it without weights, to be sharded before each process reads its share of them; None from it:
                not possible, and every process makes it whole first.
        """
        self._build_model = build
        self._build_empty = build_empty

    @property
    def trained_policy(self) -> Policy:
        """The model, once built."""
        assert self.policy is not None, "configure_model() comes first"
        return self.policy

    def configure_model(self) -> None:
        """Build, freeze, shard and check the model; does nothing the second time."""
        if self.policy is not None:
            return
        empty = self._empty_model() if self.device_mesh is not None else None
        model = self.build_model() if empty is None else empty.model
        if self.lora is not None:
            with torch.device("cpu"):  # the same random adapters everywhere
                insert_adapters(model, self.lora)
        if self.freeze_embeddings:
            freeze_embeddings(model)
        if self.activation_checkpointing:
            checkpoint_activations(model)
        policy = Policy(model, chunk_tokens=self.chunk_tokens)
        if self.device_mesh is not None:
            mixed = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            shard(policy, self.device_mesh["data_parallel"], block_dtype=mixed)
        if empty is not None:
            empty.read_weights(self.trainer.strategy.root_device)
        if self.device_mesh is not None:
            self.trainer.precision_plugin.convert_module(policy)  # bf16-true: FSDP2 settles dtypes at the first forward
        self._check_model(policy)
        if self.compile_blocks:
            compile_blocks(model)
        elif onednn_is_faster():
            use_fast_linear(model)
        self.policy = policy
        self._norm_before = self._weight_norm()
        self.policy.train()  # no dropout anywhere; train mode only lets activation checkpointing work

    def check_weights(self) -> None:
        """Refuse trained weights that are not finite or exploded, LoRA's adapters likewise; every process must call this.

        Raises:
            NumericalStop: they are.
        """
        check_weights(self._weight_norm(), before=self._norm_before, step=self.trainer.global_step)

    def _weight_norm(self) -> float:
        total = squared_norm(p for p in self.trained_policy.parameters() if p.requires_grad)
        return math.sqrt(float(total if self.device_mesh is None else self._reduce(total)))

    def _empty_model(self) -> EmptyModel | None:
        """None where the model has to be made whole: adapters that begin from its weights, or it can't be made empty."""
        if self.lora is not None and reads_weights(self.lora):
            return None
        return self._build_empty()

    def _check_model(self, policy: Policy) -> None:
        """Settle packing and verify what is computed, on the model where it is: whole, or sharded and on all processes alike."""
        data = self.data
        is_sharded = self.device_mesh is not None

        def check(model: PreTrainedModel) -> None:
            verify_no_randomness(model)
            data.packs = settle_packing(model, data.active_layout, data.packed, max_length=data.max_length)
            if data.layout != data.active_layout:  # in which the probe's pairs are laid out
                verify_layout(model, data.layout, packed=data.packs)
            if self.lora is not None:
                check_adapters(model)

        with (
            torch.device(policy.model.device),
            self.trainer.precision_plugin.forward_context() if is_sharded else nullcontext(),
        ):
            policy.run(check)
        if isinstance(policy, FSDPModule):
            policy.reshard()  # FSDP2 leaves the root whole after a forward; the optimizer takes the shards
        self.on_model_built(policy.model)

    def build_model(self) -> PreTrainedModel:
        """A new model as it is before training, whole and without adapters.

        On the CPU whatever device Lightning made the default: the same random base everywhere; it moves the model afterwards.
        """
        assert self._build_model is not None, "attach_model() comes first"
        with torch.device("cpu"):
            return self._build_model()

    def on_model_built(self, model: PreTrainedModel) -> None:
        """Called with the model as it is before training, on every process; it may be sharded and have adapters."""
