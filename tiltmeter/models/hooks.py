"""The one place that knows which module computes a site, for hooks that read hidden states and hooks that write them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM, decoder_blocks, final_norm, site_depth


def hook_site(model: PreTrainedModel, site: str, receive: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call ``receive(hidden)`` whenever the model computes a site; a tensor that it returns takes the place of ``hidden``.

    Hooks at one site run in the order they were put on, each on what the one before has left.

    Raises:
        UserError: an unknown site, or a model without recognisable blocks or final norm.
    """

    def on_output(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return receive(output)
        written = receive(output[0])
        return None if written is None else (written, *output[1:])

    def on_input(_module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        written = receive(inputs[0])
        return None if written is None else (written, *inputs[1:])

    if site == FINAL_PRE_NORM:
        return final_norm(model).register_forward_pre_hook(on_input)
    if site == FINAL_POST_NORM:
        return final_norm(model).register_forward_hook(on_output)
    blocks = decoder_blocks(model)
    return blocks[site_depth(site, len(blocks))].register_forward_hook(on_output)
