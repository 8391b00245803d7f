import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import energy_distance as energy_of_scipy
from torch import Tensor

from tiltmeter.geometry.energy_distance import energy_kernel, kernels_after_shift


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_energy_distance_in_one_dimension_equals_scipys() -> None:
    """Scipy takes every pair of points, those with themselves as well, and the root of the value."""
    x, y = noise(50, 1), 0.7 * noise(50, 1, 1) + 0.4
    kernel = energy_kernel(x, y) + (2 * (x - y).abs()).ravel().diag()
    assert math.sqrt(float(kernel.mean())) == pytest.approx(energy_of_scipy(x.ravel(), y.ravel()), abs=1e-12)


@settings(deadline=None)
def energy_distance(x: Tensor, y: Tensor) -> float:
    return float(energy_kernel(x, y).sum() / (len(x) * (len(x) - 1)))


@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 99))
def test_energy_distance_is_the_mean_over_ordered_pairs(n: int, d: int, seed: int) -> None:
    x, y = noise(n, d, seed), noise(n, d, seed + 1) + 1

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm())

    terms = [
        2 * apart(x[i], y[j]) - apart(x[i], x[j]) - apart(y[i], y[j]) for i in range(n) for j in range(n) if i != j
    ]
    assert energy_distance(x, y) == pytest.approx(sum(terms) / len(terms), abs=1e-9)


def test_clouds_of_one_distribution_are_not_apart_on_average_and_shifted_ones_are() -> None:
    found = torch.tensor([energy_distance(noise(30, 5, s), noise(30, 5, 1000 + s)) for s in range(200)])
    assert abs(float(found.mean())) < 3 * float(found.std()) / math.sqrt(200)
    x = noise(200, 5)
    assert energy_distance(x, x + 0.5) > 0.05


def test_a_common_offset_costs_no_digits() -> None:
    x, y = noise(20, 4), noise(20, 4, 1) + 0.3
    assert energy_distance(x + 1e5, y + 1e5) == pytest.approx(energy_distance(x, y), rel=1e-6)


@pytest.mark.parametrize("clusters", [list("abcdef"), list("aabccd")], ids=["one a prompt", "several a prompt"])
def test_clouds_are_compared_after_a_shift_of_other_prompts(clusters: list[str]) -> None:
    base, update = noise(6, 3) + 7, noise(6, 3, 1) + 0.5
    apart, moved, compared = kernels_after_shift(base, update, clusters)
    policy = base + update
    for i, own in enumerate(clusters):
        for j, other in enumerate(clusters):
            if own == other:
                assert apart[i, j] == moved[i, j] == compared[i, j] == 0
                continue
            others = [k for k, name in enumerate(clusters) if name not in (own, other)]
            shift = update[others].mean(0)
            for kernel, start in ((apart, base), (moved, base + shift)):
                across = (start[i] - policy[j]).norm() + (start[j] - policy[i]).norm()
                within = (base[i] - base[j]).norm() + (policy[i] - policy[j]).norm()
                assert kernel[i, j] == pytest.approx(float(across - within), abs=1e-9)


def test_a_shift_needs_a_third_prompt() -> None:
    with pytest.raises(ValueError, match="at least three clusters, got 2"):
        kernels_after_shift(noise(3, 2), noise(3, 2), ["a", "a", "b"])
