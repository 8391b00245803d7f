"""Linear maps on a CPU by oneDNN, where PyTorch would use a slower library.

PyTorch multiplies float32 matrices with MKL, which uses half the vector width of processors that aren't Intel's; oneDNN,
which PyTorch brings for other uses, takes all of it (benchmarks/limit.py shows both rates). The sums are float32 either
way, in another order.
"""

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@functools.cache
def onednn_is_faster() -> bool:
    """True on an x86 processor that isn't Intel's, where PyTorch uses MKL and has oneDNN beside it.

    Decided by what the machine is, never by a clock: the same machine always gives the same numbers.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or platform.machine() not in ("x86_64", "AMD64"):
        return False
    info = Path("/proc/cpuinfo")
    vendor = info.read_text(encoding="utf-8") if info.exists() else platform.processor()
    return "GenuineIntel" not in vendor


def linear(x: Float[Tensor, "*row d_in"], weight: Float[Tensor, "d_out d_in"], bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b``, differentiable; by oneDNN where that is faster and the numbers are float32 on a CPU."""
    plain = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if plain and x.device.type == weight.device.type == "cpu" and x.numel() and onednn_is_faster():
        made: Tensor = _Linear.apply(x, weight, bias)
        return made
    return F.linear(x, weight, bias)


class CPULinear(nn.Linear):
    """A linear layer that uses :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """``x Wᵀ + b``."""
        return linear(input, self.weight, self.bias)


def use_fast_linear(model: nn.Module) -> int:
    """Turn every plain linear layer of a model into a :class:`CPULinear`, in place; returns how many."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.__class__ = CPULinear
    return len(layers)


@contextmanager
def fast_linear(model: nn.Module) -> Iterator[None]:
    """Inside, a model's plain linear layers are :class:`CPULinear` where that is faster; afterwards what they were."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    try:
        if onednn_is_faster():
            use_fast_linear(model)
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grad_outputs
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = _product(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
        grad_weight = _product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")
    return made
