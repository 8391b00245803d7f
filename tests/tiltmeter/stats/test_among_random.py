"""The judgement of one vector among random ones: by hand, against scipy, and at its edges."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from tiltmeter.stats.among_random import ABOVE, BELOW, SAME, UNKNOWN, among_random
from tiltmeter.stats.jackknife import without_each


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_rank_and_prediction_interval_by_hand() -> None:
    found = among_random(column(2.5), column(1, 2, 3, 4)[None])
    assert (found.random_mean, found.random_low, found.random_high, found.n_random) == (2.5, 1, 4, 4)
    assert (found.p_above, found.p_below) == (3 / 5, 3 / 5)
    reach = student.ppf(0.975, 3) * np.std([1, 2, 3, 4], ddof=1) * math.sqrt(1 + 1 / 4)
    assert found.prediction == pytest.approx((2.5, 2.5 - reach, 2.5 + reach))
    assert found.difference == pytest.approx((0, -reach, reach))
    assert found.verdict == SAME


@pytest.mark.parametrize(("value", "verdict"), [(40.0, ABOVE), (-40.0, BELOW), (1.0, SAME)])
def test_far_outside_the_draws_is_above_or_below(value: float, verdict: str) -> None:
    draws = torch.linspace(-2, 2, 99, dtype=torch.float64)[None]
    assert among_random(column(value), draws).verdict == verdict


def test_beyond_the_prediction_interval_but_not_beyond_enough_draws_is_no_verdict() -> None:
    """Skewed draws: six of 99 lie further out than the vector, so its rank is .07 whatever the interval says."""
    draws = torch.cat([torch.zeros(93), torch.full((6,), 10.0)]).double()[None]
    found = among_random(column(9.0), draws)
    assert found.value > found.prediction.high
    assert found.p_above == pytest.approx(0.07)
    assert found.verdict == SAME


def test_prompts_on_which_the_vector_differs_by_chance_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    own, random = 0.3 + rng.normal(size=(12, 1)), 1e-3 * rng.normal(size=(12, 99))
    kept = without_each([str(i) for i in range(12)])
    figures = kept @ torch.from_numpy(np.hstack([own, random])) / kept.sum(1, keepdim=True)
    found = among_random(figures[:, 0], figures[:, 1:])
    difference = (own - random.mean(1, keepdims=True))[:, 0]
    reach = student.ppf(0.975, 11) * difference.std(ddof=1) / math.sqrt(12)
    assert found.difference == pytest.approx((difference.mean(), difference.mean() - reach, difference.mean() + reach))


@pytest.mark.parametrize("draws", [[[]], [[1.0]], [[math.nan, 1.0]]])
def test_fewer_than_two_draws_give_no_verdict(draws: list[list[float]]) -> None:
    found = among_random(column(1.0), torch.tensor(draws, dtype=torch.float64))
    assert found.verdict == UNKNOWN
    assert math.isnan(found.p_above)
    assert found.n_random == sum(not math.isnan(x) for x in draws[0])


def test_a_vector_without_a_value_has_no_verdict() -> None:
    assert among_random(column(math.nan), column(1, 2, 3)[None]).verdict == UNKNOWN


def test_draws_without_a_value_are_left_out() -> None:
    with_gap = among_random(column(2.5), column(1, 2, math.nan, 3, 4)[None])
    assert with_gap == among_random(column(2.5), column(1, 2, 3, 4)[None])
