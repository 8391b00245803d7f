"""Whether trained weights are fit to be kept: finite, and of about the size of those that training began with."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_modules.step_guard import CURE
from tiltmeter.errors import NumericalStop

MOST_GROWTH = 100.0
"""Norm of trained weights over that of the same weights before training, from where they are called exploded."""


def squared_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all weights, float64, which float32 weights can't overflow; of this process's part where sharded."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in (each.detach() for each in parameters)]
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    return torch.stack(norms).square().sum()


def check_weights(norm: float, *, before: float, step: int) -> None:
    """Refuse weights that no checkpoint and no export may hold.

    Args:
        norm: Frobenius norm of the trained weights; NaN or infinite where one of them is.
        before: that of the same weights before training; 0: they grow from nothing, and only have to be finite.
        step: optimizer steps taken.

    Raises:
        NumericalStop: they are not finite, or more than 100 times as large as before.

    >>> check_weights(12.0, before=11.0, step=3)
    >>> check_weights(math.nan, before=11.0, step=3)
    Traceback (most recent call last):
    tiltmeter.errors.NumericalStop: step 3: weights are not finite; they are neither saved nor exported. A lower \
module.learning_rate or a higher precision is the usual cure
    """
    if math.isfinite(norm) and (norm <= MOST_GROWTH * before or before == 0):
        return
    how = "not finite"
    if math.isfinite(norm):
        how = f"{norm / before:.2g} times as large as before training (norm {norm:.3g}; {MOST_GROWTH:g} times is the most)"
    raise NumericalStop(f"step {step}: weights are {how}; they are neither saved nor exported. {CURE}")
