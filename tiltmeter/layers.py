"""Where the parts of a Hugging Face causal language model are: backbone, decoder blocks, embeddings, unembedding.

Every difference between model families that matters to this project is in this file.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiltmeter.errors import UserError


@dataclass(frozen=True)
class Unembedding:
    """logits = cap · tanh(scale · (h Wᵀ + b) / cap), the last map of a causal language model."""

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    """Constant factor on the logits (Cohere ``logit_scale``, Granite ``1 / logits_scaling``)."""
    soft_cap: float | None = None
    """Gemma 2's ``final_logit_softcapping``; None: no cap."""


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its unembedding: ids in, hidden states after the final norm out (HF ``last_hidden_state``).

    Raises:
        UserError: the model has no separate backbone.
    """
    found = model.get_decoder()
    if not isinstance(found, nn.Module) or found is model:
        raise UserError(f"model: expected a causal language model with a backbone, got {type(model).__name__}")
    return found


def unembedding(model: PreTrainedModel) -> Unembedding:
    """Weight, bias and logit transformation of the model's head, read from its module and its configuration.

    Raises:
        UserError: the model has no linear output embedding.
    """
    head = model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise UserError(f"model: expected a linear unembedding (lm_head), {type(model).__name__} has none")
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    soft_cap = getattr(config, "final_logit_softcapping", None)
    bias = getattr(head, "bias", None)
    return Unembedding(head.weight, bias, scale, None if soft_cap is None else float(soft_cap))


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks, block 0 first.

    Raises:
        UserError: no list of ``config.num_hidden_layers`` modules was found directly in the backbone.
    """
    n_layers = model.config.num_hidden_layers
    for module in backbone(model).children():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise UserError(f"model: expected a list of {n_layers} decoder blocks in {type(model).__name__}, found none")


def sliding_window(model: PreTrainedModel) -> int | None:
    """How many tokens a token of the narrowest layers sees (Mistral, Gemma 2, GPT-Neo); None: all before it."""
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None and not any("sliding" in kind for kind in kinds):
        return None
    window: int | None = getattr(model.config, "sliding_window", None) or getattr(model.config, "window_size", None)
    return window


def embedding_parameters(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Token and position embeddings and the unembedding: what the paper freezes (arXiv 2512.11838).

    Position embeddings are the backbone's own ``nn.Embedding`` modules (GPT-2 ``wpe``); rotary models have none.
    """
    seen: set[int] = set()
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    modules += [child for child in backbone(model).children() if isinstance(child, nn.Embedding)]
    for module in modules:
        for parameter in [] if module is None else module.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
