"""A constant vector that is trained in the place of weights: added to every token's hidden state at one site of a frozen model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiltmeter.errors import UserError, argument
from tiltmeter.models.state_adapter import StateAdapter, insert_adapter

NOT_MERGED = "a vector is added to hidden states, which no weight of the model does"
"""Reason why there is no whole model to write."""


@dataclass(frozen=True)
class VectorOptions:
    """Options of a vector that is trained.

    Args:
        site: as :mod:`tiltmeter.models.layers` names it; by default behind the first block, so that all others can act on it.
        scale: the vector is its parameter times this, so that an optimizer's step in activation units is the learning rate times
            it: rates for weights are too small for a vector.
        both_signs: train the vector and its opposite at once, with which the rejected response is to be preferred (BiPO, arXiv
            2406.00045).

    Raises:
        UserError: a scale that is not above 0.
    """

    site: str = "layer_00"
    scale: float | int = 100.0
    both_signs: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if not self.scale > 0:
            raise UserError(f"{argument('VectorOptions.scale')}: expected more than 0, got {self.scale}")


class TrainedVector(StateAdapter):
    """h ↦ h + scale · d at every token, d starting at 0."""

    name = "trained_vector"

    def __init__(self, d_model: int, *, site: str, scale: float | int = 1.0) -> None:
        super().__init__(site)
        self.d = nn.Parameter(torch.zeros(d_model))
        self.scale, self._sign = scale, 1.0

    @contextmanager
    def turned(self) -> Iterator[None]:
        """Inside, the opposite vector is added."""
        self._sign = -1.0
        try:
            yield
        finally:
            self._sign = 1.0

    @property
    def values(self) -> Float[Tensor, " d_model"]:
        """The vector, in activation units."""
        return self.scale * self.d

    def change(self, hidden: Float[Tensor, "row token d_model"]) -> Float[Tensor, "row token d_model"]:
        """The states with the vector added."""
        return hidden + self._sign * self.values.to(hidden.dtype)


def insert_vector(
    model: PreTrainedModel, options: VectorOptions, values: Float[Tensor, " d_model"] | None = None
) -> TrainedVector:
    """Put a vector into a model, the only parameter that is trained from now on.

    Args:
        values: in activation units; None: 0, with which the model computes what it did.

    Raises:
        UserError: the model has no such site, or another width.
    """
    d_model = int(model.config.hidden_size)
    if values is not None and tuple(values.shape) != (d_model,):
        raise UserError(
            f"a vector of {len(values)} numbers, expected {d_model}, the width of this model; give the base it was trained on"
        )
    vector = TrainedVector(d_model, site=options.site, scale=options.scale)
    insert_adapter(model, vector)
    if values is not None:
        with torch.no_grad():
            vector.d.copy_(values / options.scale)
    return vector


def trained_vector(model: PreTrainedModel) -> TrainedVector | None:
    """The vector that :func:`insert_vector` put into a model; None: it has none."""
    return getattr(model, TrainedVector.name, None)
