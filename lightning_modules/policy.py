"""The trained model as one nn.Module whose forward gives sequence log-probs, and how it is sharded."""

import os
import shutil
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from tiltmeter.errors import UserError
from tiltmeter.models.layers import decoder_blocks, embedding_parameters
from tiltmeter.models.sharded_weights import EmptyModel
from tiltmeter.pairs.batch import PreferenceBatch
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.pairs.router_loss import log_probs_and_router_loss

PolicyBuilder = Callable[[], PreTrainedModel]
EmptyBuilder = Callable[[], EmptyModel | None]
T = TypeVar("T")


class Policy(nn.Module):
    """A causal language model seen as log π(y|x). Its forward is the unit that DDP and FSDP2 wrap."""

    def __init__(self, model: PreTrainedModel, *, chunk_tokens: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """Summed log-probs of every sequence of a batch, in nats."""
        return sequence_log_probs(self.model, batch, chunk_tokens=self.chunk_tokens)

    def with_router_loss(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """The same, and the load-balancing loss of a mixture of experts; not of a sharded model."""
        return log_probs_and_router_loss(self.model, batch, chunk_tokens=self.chunk_tokens)

    def run(self, function: Callable[[PreTrainedModel], T]) -> T:
        """Let a function use the model, its weights gathered where they are sharded; all processes must do so alike."""
        return function(self.model)


def freeze_embeddings(model: PreTrainedModel) -> int:
    """Freeze token and position embeddings and the unembedding; returns the number of frozen parameters."""
    n_frozen = 0
    for parameter in embedding_parameters(model):
        parameter.requires_grad_(False)
        n_frozen += parameter.numel()
    return n_frozen


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the input of each decoder block for the backward pass.

    Raises:
        UserError: the family doesn't support it.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"module.activation_checkpointing: {type(model).__name__} does not support it; leave it out")
    model.activation_checkpointing_enable({"use_reentrant": False})


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile each decoder block in place, once for all lengths.

    Raises:
        UserError: a CPU without a C++ compiler, which torch.compile needs there.
    """
    if not torch.cuda.is_available() and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise UserError(
            "module.compile_blocks: no C++ compiler was found (g++ or clang++), which a CPU needs; install one or leave it out"
        )
    for block in decoder_blocks(model):
        block.compile(dynamic=True)


def shard(policy: Policy, mesh: DeviceMesh, *, block_dtype: torch.dtype | None = None) -> None:
    """FSDP2 over the data-parallel dimension: each decoder block is a unit, everything else (embeddings, norm, head) the root.

    Args:
        block_dtype: in which blocks are gathered and their products computed, while their shards, gradients (summed over
            processes) and the residual stream between them stay as they are; None: their own. What autocast would cast a
            weight to anyway: half the bytes to send, and no cast copy of each weight kept for the backward pass.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=block_dtype, reduce_dtype=block_dtype and torch.float32, cast_forward_inputs=False
    )
    for block in decoder_blocks(policy.model):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh)
    register_fsdp_forward_method(policy, "run")
