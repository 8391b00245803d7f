"""The trained model as one nn.Module whose forward gives sequence log-probs, and how it is sharded."""

import os
import shutil
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from tiltmeter.batch import PreferenceBatch
from tiltmeter.errors import UserError
from tiltmeter.layers import decoder_blocks, embedding_parameters
from tiltmeter.log_probs import sequence_log_probs

PolicyBuilder = Callable[[], PreTrainedModel]
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


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """FSDP2 over the data-parallel dimension: each decoder block is a unit, everything else (embeddings, norm, head) the root."""
    for block in decoder_blocks(policy.model):
        fully_shard(block, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    register_fsdp_forward_method(policy, "run")
