"""How fast this machine multiplies matrices: with torch.mm, and with the library that lies beside it."""

import time

import torch

from benchmarks import common

MATMULS = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 256, 704), (4096, 704, 256), (8192, 256, 256)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (8192, 4096, 11008), (8192, 896, 4864)),
}
"""(m, k, n) of the products whose best rate is the machine's."""


def matmul_rate(shape: tuple[int, int, int], device: str, seconds: float, *, onednn: bool = False) -> float:
    """Best rate of one product over repeats, in FLOP/s: of ``torch.mm``, or of the CPU library that torch brings beside it."""
    m, k, n = shape
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    if onednn:
        a, b = a.to_mkldnn(), b.to_mkldnn()
    synchronize = common.synchronizer(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize()
        started = time.perf_counter()
        torch.nn.functional.linear(a, b)
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * m * k * n / best


def matmul_rates(device: str, seconds: float) -> dict[str, list[float]]:
    """Library → rate of each product. torch multiplies float32 on a CPU with MKL where it has it, oneDNN lies idle."""
    kernels = {"torch.mm": False}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        kernels["oneDNN"] = True
    return {
        name: [matmul_rate(shape, device, seconds, onednn=onednn) for shape in MATMULS[device]]
        for name, onednn in kernels.items()
    }


def best_rates(before: dict[str, list[float]], after: dict[str, list[float]], device: str) -> dict[str, float]:
    """Print the rates of the products, the better of two measurements; returns the largest of each library."""
    best = {name: [max(pair) for pair in zip(before[name], after[name], strict=True)] for name in before}
    shapes = [" × ".join(map(str, shape)) for shape in MATMULS[device]]
    rows = [[shape, *(f"{best[name][i] / 1e9:,.0f}" for name in best)] for i, shape in enumerate(shapes)]
    common.print_table("Matrix products, GFLOP/s, best of repeats", ["m × k × n", *best], rows)
    return {name: max(values) for name, values in best.items()}
