"""How often intervals of arms hold the truth, and how often arms that don't differ are told apart, by simulation."""

import math

import numpy as np
import pytest
import torch

from analysis.claims.statistics import STATISTICS, Rows
from benchmarks.verdicts import belief_rates, interval_coverage, steering_rates
from tiltmeter.stats.arms import Arm, arm_difference, arm_interval

pytestmark = pytest.mark.slow
N_SETS, N_PROMPTS = 1000, 48
ERROR = 2.6 * math.sqrt(0.05 * 0.95 / N_SETS)


def test_intervals_of_arms_hold_the_truth() -> None:
    assert min(interval_coverage(600).values()) >= 0.93


def test_a_vector_like_random_ones_is_rarely_above_them_and_one_far_above_is() -> None:
    rates = list(steering_rates(300).values())
    assert rates[0] <= 0.025 + 2.6 * math.sqrt(0.025 * 0.975 / 300)
    assert rates[-1] >= 0.9


def test_figures_at_their_margin_are_rarely_called_unchanged_and_those_that_did_not_move_mostly_are() -> None:
    at_margin, _, none = belief_rates(400).values()
    assert at_margin <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / 400)
    assert none >= 0.9


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


@pytest.mark.parametrize("between", [0.0, 1.0], ids=["prompts alone vary", "both"])
def test_known_standard_errors_count_like_prompts(between: float) -> None:
    """Figures of tables, whose own interval says how much prompts vary."""
    rng, held, found, error = np.random.default_rng(1), 0, 0, 0.5

    def arm(prompts: float, n_runs: int) -> Arm:
        values = error * prompts + between * rng.normal(size=(1, n_runs))
        return Arm(torch.from_numpy(values), error_of_prompts=error)

    for _ in range(N_SETS):
        low, high = arm_interval(arm(rng.normal(), 3))[1:]
        held += low <= 0 <= high
        found += arm_difference(arm(rng.normal(), 3), arm(rng.normal(), 3)).p_greater <= 0.05
    assert held / N_SETS >= 0.95 - ERROR
    assert found / N_SETS <= 0.05 + ERROR


@pytest.mark.parametrize(
    "name", ["mean_cosine", "top1_energy", "sigma_ratio", "shift_share", "entropy_change", "explained_by_shift"]
)
@pytest.mark.parametrize("n_prompts", [32, 96])
def test_interval_over_prompts_of_a_statistic_holds_its_mean(name: str, n_prompts: int) -> None:
    """A shift, two directions and noise; the truth is the statistic's mean over many draws of as many prompts."""
    generator = torch.Generator().manual_seed(0)
    d, clusters = 24, [str(i) for i in range(n_prompts)]
    shift = torch.zeros(d, dtype=torch.float64)
    shift[0] = 3.0
    values, intervals = [], []
    for _ in range(n_sets := 200):
        base = torch.randn(n_prompts, d, generator=generator, dtype=torch.float64)
        noise = torch.randn(n_prompts, d, generator=generator, dtype=torch.float64)
        noise[:, 1] *= 3
        found = STATISTICS[name](Rows(base, shift + 0.5 * noise, clusters))
        values.append(float(found[0]))
        intervals.append(arm_interval(Arm(found[:, None])))
    truth = sum(values) / n_sets
    held = sum(low <= truth <= high for _, low, high in intervals) / n_sets
    assert held >= 0.95 - 2.6 * math.sqrt(0.05 * 0.95 / n_sets), held
