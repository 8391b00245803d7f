"""The making of the model that is trained: built or read sharded, frozen, adapted, compiled."""

import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

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
from tiltmeter.errors import UserError
from tiltmeter.models.cpu_linear import onednn_is_faster, use_fast_linear
from tiltmeter.models.lora import check_lora, insert_adapters, is_trained, merged_state, reads_weights
from tiltmeter.models.quantization import dequantized
from tiltmeter.models.sharded_weights import EmptyModel
from tiltmeter.models.trained_vector import NOT_MERGED, VectorOptions, insert_vector
from tiltmeter.sparse.steering import NOT_MERGED as STEERING_NOT_MERGED
from tiltmeter.sparse.steering import SparseOptions, insert_steering
from tiltmeter.sparse.steering_file import open_sae


class ModelFactory:
    """Makes a policy; its options are explained at :class:`~lightning_modules.base.LogProbModule`.

    Raises:
        UserError: options that don't go together.
    """

    def __init__(
        self,
        *,
        freeze_embeddings: bool,
        chunk_tokens: int | None,
        lora: LoraConfig | None,
        vector: VectorOptions | None = None,
        sparse: SparseOptions | None = None,
        activation_checkpointing: bool,
        compile_blocks: bool,
    ) -> None:
        check_number("chunk_tokens", 1 if chunk_tokens is None else chunk_tokens, 1, float("inf"))
        if lora is not None:
            check_lora(lora, freeze_embeddings=freeze_embeddings)
        if sum(each is not None for each in (lora, vector, sparse)) > 1:
            raise UserError(
                "module.vector, module.sparse: adapters, a vector or a steering are trained, only one of them; leave the others out"
            )
        self.vector, self.sparse = vector, sparse
        self.sae = None if sparse is None else open_sae(sparse)  # a file that is missing is known before any long work
        self.not_merged = STEERING_NOT_MERGED if sparse is not None else None if vector is None else NOT_MERGED
        """Reason why there will be no whole model to write; None: there will be one, as far as is known without the model."""
        self.freeze_embeddings, self.chunk_tokens, self.lora = freeze_embeddings, chunk_tokens, lora
        self.activation_checkpointing, self.compile_blocks = activation_checkpointing, compile_blocks
        self.build: PolicyBuilder | None = None
        self.build_empty: EmptyBuilder = lambda: None

    def plain(self) -> "ModelFactory":
        """A factory of the same model that adapts and trains nothing of it: for what it computes."""
        plain = ModelFactory(
            freeze_embeddings=True,
            chunk_tokens=self.chunk_tokens,
            lora=None,
            activation_checkpointing=False,
            compile_blocks=self.compile_blocks,
        )
        plain.build, plain.build_empty = self.build, self.build_empty
        return plain

    def make_base(self) -> PreTrainedModel:
        """Build the model as it is before training, whole and without adapters.

        On the CPU whatever device Lightning made the default: the same random base everywhere; it moves the model afterwards.
        """
        assert self.build is not None, "attach_model() comes first"
        with torch.device("cpu"):
            return self.build()

    def make_plain(self) -> PreTrainedModel:
        """:meth:`make_base` without quantization: its weights are the very numbers that the quantized ones stand for."""
        with torch.device("cpu"):
            return dequantized(self.make_base())

    def make_merged(self, state: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """A plain model, and weights for it with which it computes what the trained one does.

        Args:
            state: the trained model's state dict, whole.

        Raises:
            UserError: its adapters can't be merged.
        """
        if self.not_merged is not None:
            raise UserError(self.not_merged)
        whole = self.make_plain()
        if self.lora is None:
            return whole, state
        insert_adapters(whole, self.lora)
        # quantized weights have other names and shapes; those that were not trained are the same
        own = whole.state_dict()
        return whole, merged_state(whole, {name: state[name] if is_trained(name) else own[name] for name in own})

    def make(self, trainer: Trainer, mesh: DeviceMesh | None) -> Policy:
        """Build, adapt, freeze and shard; with a mesh each process reads its share of the weights where it can.

        Raises:
            UserError: a vector or a steering is to be trained on a mesh, or an autoencoder does not fit the model.
        """
        if mesh is not None and not (self.vector is None and self.sparse is None):
            raise UserError("module.vector, module.sparse: neither is sharded; use trainer=ddp, gpu or cpu")
        empty = self._empty_model() if mesh is not None else None
        model = self.make_base() if empty is None else empty.model
        if self.lora is not None:
            with torch.device("cpu"):  # the same random adapters everywhere
                insert_adapters(model, self.lora)
        if self.vector is not None:
            insert_vector(model, self.vector)
        if self.sparse is not None and self.sae is not None:
            insert_steering(model, self.sae, self.sparse)
        if self.freeze_embeddings and self.lora is None:  # adapters freeze all but themselves and modules_to_save
            freeze_embeddings(model)
        if self.activation_checkpointing:
            checkpoint_activations(model)
        policy = Policy(model, chunk_tokens=self.chunk_tokens)
        if mesh is not None:
            mixed = torch.bfloat16 if trainer.precision == "bf16-mixed" else None
            shard(policy, mesh["data_parallel"], block_dtype=mixed)
        if empty is not None:
            empty.read_weights(trainer.strategy.root_device)
        if mesh is not None:
            trainer.precision_plugin.convert_module(policy)  # bf16-true: FSDP2 settles dtypes at the first forward
        return policy

    def speed_up(self, model: PreTrainedModel) -> None:
        """Compile blocks where asked to, else take the faster matrix product of CPUs."""
        if self.compile_blocks:
            compile_blocks(model)
        elif onednn_is_faster():
            use_fast_linear(model)

    def _empty_model(self) -> EmptyModel | None:
        """None where the model has to be made whole: adapters that begin from its weights, or it can't be made empty."""
        if self.lora is not None and reads_weights(self.lora):
            return None
        return self.build_empty()
