"""How often intervals of likeness hold the truth, and equivalence its level and power, by simulation."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.calibration.coverage import Z, monte_carlo_band
from tiltmeter.geometry.similarity import cka_interval, displacement, gram, mutual_knn, procrustes, rsa
from tiltmeter.stats.equivalence import equivalence
from tiltmeter.stats.jackknife import COSINE, Interval, cluster_mean_interval

pytestmark = pytest.mark.slow
N_SETS, N_FOR_TRUTH, D_MODEL = 300, 400, 24  # a mean over 400 is known to a twentieth of the spread of one set
N_FOR_MARGIN = 1000  # but a margin at the truth has to be the truth
Measure = Callable[[Tensor, Tensor], Interval]
MEASURES: dict[str, Measure] = {
    "cka": lambda x, y: cka_interval(gram(x), gram(y)),
    "rsa": lambda x, y: rsa(gram(x), gram(y), n_permutations=0).interval,
    "mutual_knn": lambda x, y: mutual_knn(x, y, k=5).interval,
    "procrustes": procrustes,
    "displacement": displacement,
}


def clouds(n: int, apart: float, seed: int) -> tuple[Tensor, Tensor]:
    """States of falling spread and what becomes of them: noise and a shift are added."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, D_MODEL + 1, dtype=torch.float64).rsqrt()
    x = torch.randn(n, D_MODEL, generator=draw, dtype=torch.float64) * spread
    return x, x + 0.3 + apart * torch.randn(n, D_MODEL, generator=draw, dtype=torch.float64) * spread.flip(0)


@pytest.mark.parametrize("apart", [0.2, 1.0])
@pytest.mark.parametrize("n", [32, 96])
@pytest.mark.parametrize("name", MEASURES)
def test_intervals_hold_the_mean_over_draws(name: str, n: int, apart: float) -> None:
    """93 to 99 %: what neighbours and ranks held fixed add to an interval may be too much, never too little."""
    measure = MEASURES[name]
    truth = sum(measure(*clouds(n, apart, 10**6 + s)).value for s in range(N_FOR_TRUTH)) / N_FOR_TRUTH
    found = [measure(*clouds(n, apart, s)) for s in range(N_SETS)]
    rate = sum(each.low <= truth <= each.high for each in found) / N_SETS
    low, _ = monte_carlo_band(0.93, 0.97, n_sets=N_SETS)
    assert rate >= low, (rate, truth)


@pytest.mark.parametrize("n", [24, 100])
def test_equivalence_keeps_its_level_at_the_margin_and_finds_half_of_it(n: int) -> None:
    """Paired differences whose spread is such that the margin is seven standard errors."""
    n_sets, names = 1000, [str(i) for i in range(n)]
    margin = 7 / math.sqrt(n)

    def called(mean: float, sign: float) -> float:
        hits = 0
        for seed in range(n_sets):
            draw = torch.Generator().manual_seed(seed)
            x = sign * mean + torch.randn(n, generator=draw, dtype=torch.float64)
            hits += equivalence(cluster_mean_interval(x.tolist(), names), n, low=-margin, high=margin).is_equivalent
        return hits / n_sets

    for sign in (-1.0, 1.0):
        assert called(margin, sign) <= 0.05 + Z * math.sqrt(0.05 * 0.95 / n_sets)
        assert called(margin / 2, sign) >= 0.9


@pytest.mark.parametrize("apart", [0.5, 1.0])
def test_equivalence_of_cka_keeps_its_level_where_the_truth_is_the_margin(apart: float) -> None:
    n, n_sets = 64, 500
    truth = sum(MEASURES["cka"](*clouds(n, apart, 10**6 + s)).value for s in range(N_FOR_MARGIN)) / N_FOR_MARGIN
    called = sum(
        equivalence(MEASURES["cka"](*clouds(n, apart, s)), n, low=truth, scale=COSINE).is_equivalent
        for s in range(n_sets)
    )
    assert called / n_sets <= 0.05 + Z * math.sqrt(0.05 * 0.95 / n_sets)
