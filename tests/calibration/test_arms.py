"""How often intervals of arms hold the truth, and how often arms that don't differ are told apart, by simulation."""

import math

import numpy as np
import pytest
import torch

from benchmarks.verdicts import interval_coverage, steering_rates
from tiltmeter.stats.arms import Arm, arm_difference

pytestmark = pytest.mark.slow
N_SETS, N_PROMPTS = 1000, 48
ERROR = 2.6 * math.sqrt(0.05 * 0.95 / N_SETS)


def test_intervals_of_arms_hold_the_truth() -> None:
    assert min(interval_coverage(600).values()) >= 0.93


def test_a_vector_like_random_ones_is_rarely_above_them_and_one_far_above_is() -> None:
    rates = list(steering_rates(300).values())
    assert rates[0] <= 0.025 + 2.6 * math.sqrt(0.025 * 0.975 / 300)
    assert rates[-1] >= 0.9


@pytest.mark.parametrize("between", [0.0, 0.3, 3.0], ids=["prompts alone vary", "both", "seeds alone vary"])
@pytest.mark.parametrize(
    ("n_own", "n_other", "is_population"), [(3, 1, False), (3, 3, False), (3, 5, True), (5, 2, False)]
)
def test_arms_that_do_not_differ_are_told_apart_in_five_of_a_hundred(
    between: float, n_own: int, n_other: int, is_population: bool
) -> None:
    rng, found = np.random.default_rng(0), 0

    def arm(prompts: np.ndarray, n_runs: int, *, is_population: bool = False) -> Arm:
        """Figures of the same prompts: a part that all runs share, one of the run, and one of its own for each."""
        values = prompts[:, None] + between * rng.normal(size=n_runs) + rng.normal(size=(N_PROMPTS, n_runs))
        x = torch.from_numpy(values)
        return Arm(torch.cat([x.mean(0, keepdim=True), (x.sum(0) - x) / (N_PROMPTS - 1)]), is_population)

    for _ in range(N_SETS):
        prompts = rng.normal(size=N_PROMPTS)
        found += (
            arm_difference(arm(prompts, n_own), arm(prompts, n_other, is_population=is_population)).p_greater <= 0.05
        )
    assert found / N_SETS <= 0.05 + ERROR
