"""Figures of arms: Student's and the jackknife's intervals, the wider of both; Holm's adjustment."""

import math

import pytest
import torch
from scipy.stats import t as student
from scipy.stats import ttest_ind, ttest_rel

from tiltmeter.stats.arms import Arm, arm_difference, arm_interval
from tiltmeter.stats.multiplicity import holm

ONE, OTHER = torch.tensor([[1.0, 1.4, 1.3]]).double(), torch.tensor([[0.2, 0.9, 0.1]]).double()


def without_prompts(values: torch.Tensor) -> torch.Tensor:
    """[1 + prompt, run] means over all prompts and without each, of [prompt, run] values."""
    n = len(values)
    return torch.cat([values.mean(0, keepdim=True), (values.sum(0) - values) / (n - 1)])


def test_interval_over_runs_alone_is_students() -> None:
    found = arm_interval(Arm(ONE))
    reach = student.ppf(0.975, 2) * float(ONE.std()) / math.sqrt(3)
    assert found == pytest.approx((float(ONE.mean()), float(ONE.mean()) - reach, float(ONE.mean()) + reach))


def test_interval_of_one_run_is_that_over_prompts() -> None:
    x = torch.randn(20, 1, generator=torch.Generator().manual_seed(0)).double()
    found = arm_interval(Arm(without_prompts(x)))
    reach = student.ppf(0.975, 19) * float(x.std()) / math.sqrt(20)
    assert found == pytest.approx((float(x.mean()), float(x.mean()) - reach, float(x.mean()) + reach))


def test_the_wider_of_the_two_counts() -> None:
    x = (
        torch.randn(20, 1, generator=torch.Generator().manual_seed(0)).double()
        + torch.tensor([[0.0, 5.0, -5.0]]).double()
    )
    runs, both = arm_interval(Arm(without_prompts(x)[:1])), arm_interval(Arm(without_prompts(x)))
    assert both == pytest.approx(runs)


def test_difference_of_arms_is_welchs_and_of_the_same_runs_is_paired() -> None:
    for found, expected in (
        (arm_difference(Arm(ONE), Arm(OTHER)), ttest_ind(ONE[0], OTHER[0], equal_var=False, alternative="greater")),
        (arm_difference(Arm(ONE), Arm(OTHER), paired=True), ttest_rel(ONE[0], OTHER[0], alternative="greater")),
    ):
        assert found.p_greater == pytest.approx(expected.pvalue)
        assert found.interval.value == pytest.approx(float((ONE - OTHER).mean()))


def test_single_run_is_taken_to_vary_as_the_other_arm_does() -> None:
    found = arm_difference(Arm(ONE), Arm(OTHER[:, :1]))
    reach = student.ppf(0.975, 2) * float(ONE.std()) * math.sqrt(1 + 1 / 3)
    assert found.interval.high - found.interval.value == pytest.approx(reach)


def test_draws_of_a_population_have_to_be_passed_not_their_mean() -> None:
    draws = torch.linspace(0, 1, 9).double()[None]
    beyond, among = Arm(torch.tensor([[2.9, 3.0, 3.1]]).double()), Arm(torch.tensor([[0.89, 0.9, 0.91]]).double())
    assert arm_difference(beyond, Arm(draws, is_population=True)).p_greater < 0.001
    assert arm_difference(among, Arm(draws)).p_greater < 0.01
    assert arm_difference(among, Arm(draws, is_population=True)).p_greater > 0.1


def test_other_prompts_and_two_single_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the same prompts, got 1 and 3"):
        arm_difference(Arm(ONE), Arm(torch.ones(3, 2).double()))
    with pytest.raises(ValueError, match="at least two runs"):
        arm_difference(Arm(ONE[:, :1]), Arm(OTHER[:, :1]))


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.02, 0.03, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
