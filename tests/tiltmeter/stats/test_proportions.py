"""Shares: scipy's Clopper–Pearson where prompts are independent; clusters, ties, and what is refused."""

import pytest
from scipy.stats import binomtest

from tiltmeter.stats.proportions import pooled_share_interval, share_interval


def names(n: int, each: int = 1) -> list[str]:
    return [str(i // each) for i in range(n)]


@pytest.mark.parametrize(("k", "n"), [(0, 8), (1, 8), (7, 8), (8, 8), (50, 64), (128, 128)])
def test_independent_prompts_have_clopper_and_pearsons_interval(k: int, n: int) -> None:
    """To the two values that steady a small variance."""
    found = share_interval([1.0] * k + [0.0] * (n - k), names(n))
    exact = binomtest(k, n).proportion_ci(method="exact")
    assert found.value == k / n
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert found.high > found.low


def test_equal_answers_of_one_prompt_are_one_answer() -> None:
    answers = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    once = share_interval(answers, names(10))
    repeated = share_interval([x for x in answers for _ in range(4)], names(40, each=4))
    assert 1 <= (repeated.high - repeated.low) / (once.high - once.low) < 1.2, (
        "Student’s quantiles of few prompts widen it"
    )
    naive = share_interval([x for x in answers for _ in range(4)], names(40))
    assert naive.high - naive.low < 0.7 * (repeated.high - repeated.low)


def test_ties_vary_less_than_yes_and_no() -> None:
    ties = share_interval([0.5] * 20 + [1.0, 0.0] * 5, names(30))
    votes = share_interval([1.0, 0.0] * 15, names(30))
    assert ties.value == votes.value == 0.5
    assert ties.high - ties.low < votes.high - votes.low


def test_pooled_shares_of_single_trials_are_shares() -> None:
    answers = [1.0, 0.0, 1.0, 1.0, 0.0]
    pooled = pooled_share_interval(answers, [1.0] * 5, names(5))
    assert pooled == pytest.approx(share_interval(answers, names(5)))


@pytest.mark.parametrize(("values", "clusters"), [([], []), ([1.5], ["a"]), ([1.0], ["a", "b"]), ([-0.1], ["a"])])
def test_values_outside_zero_to_one_are_refused(values: list[float], clusters: list[str]) -> None:
    with pytest.raises(ValueError, match="expected shares from 0 to 1"):
        share_interval(values, clusters)
