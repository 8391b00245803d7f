"""Adapters that write hidden states at one site of a frozen model: what a trained vector and sparse steering have in common."""

from abc import abstractmethod
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiltmeter.models.hooks import hook_site
from tiltmeter.models.layers import decoder_blocks, site_depth


class StateAdapter(nn.Module):
    """Changes the hidden states of every token at a site while it is on, as it is at first.

    Args:
        site: as :mod:`tiltmeter.models.layers` names it.
    """

    name: ClassVar[str]
    """Name of its module in the model, and so the start of its parameters' names."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self._is_on = True

    def enable_adapters(self, enabled: bool) -> None:
        """Turn it on or off, as peft's layers are."""
        self._is_on = enabled

    @abstractmethod
    def change(self, hidden: Float[Tensor, "row token d_model"]) -> Float[Tensor, "row token d_model"]:
        """Hidden states to go on with."""

    def forward(self, hidden: Float[Tensor, "row token d_model"]) -> Float[Tensor, "row token d_model"] | None:
        """Hidden states to go on with; None: those that there are."""
        return self.change(hidden) if self._is_on else None


def insert_adapter(model: PreTrainedModel, adapter: StateAdapter) -> None:
    """Freeze a model and put an adapter into it, whose parameters are trained if they were to be.

    Raises:
        UserError: the model has no such site.
    """
    site_depth(adapter.site, len(decoder_blocks(model)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.add_module(adapter.name, adapter.to(model.device))
    hook_site(model, adapter.site, adapter)
