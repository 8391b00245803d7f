"""Depth by hand: shares, curves by token, recovery, and what forced tokens leave; against a jackknife written out."""

import math

import pytest
import torch
from scipy.special import stdtrit

from tiltmeter.scoring.depth import (
    even_share,
    first_token_share,
    mean_by_token,
    preference_left,
    ratio_of_sums,
    recovery_by_token,
)

GROUPS = ["a", "b", "c"]


def test_share_of_the_first_tokens_is_a_share_of_the_sum() -> None:
    kl = [torch.tensor([3.0, 1.0, 1.0]), torch.tensor([2.0]), torch.tensor([0.5, 1.5, 1.0])]
    assert first_token_share(kl, GROUPS, n_first=2).value == pytest.approx((4 + 2 + 2) / 10)
    assert first_token_share(kl, GROUPS, n_first=9).value == 1.0


@pytest.mark.parametrize("n_first", [1, 3, 5])
def test_even_divergence_has_the_even_share(n_first: int) -> None:
    lengths = [4, 9, 17]
    share = first_token_share([torch.full((n,), 0.2) for n in lengths], GROUPS, n_first=n_first)
    assert share.value == pytest.approx(even_share(lengths, n_first=n_first))


def test_share_does_not_depend_on_the_scale_and_stays_in_0_to_1() -> None:
    kl = [
        torch.rand(12, generator=torch.Generator().manual_seed(i)) * torch.tensor([9.0] * 5 + [0.01] * 7)
        for i in range(3)
    ]
    share, tiny = first_token_share(kl, GROUPS), first_token_share([1e-3 * of for of in kl], GROUPS)
    assert list(tiny) == pytest.approx(list(share), abs=1e-6)
    assert 0.8 < share.low < share.value < share.high < 1


def test_models_that_are_the_same_have_no_share() -> None:
    rounding = [torch.tensor([1e-8, -1e-8, 2e-8])] * 3
    assert all(map(math.isnan, first_token_share(rounding, GROUPS)))
    assert all(math.isnan(at.figure.value) for at in recovery_by_token(rounding, rounding, GROUPS))


def test_mean_by_token_is_of_the_responses_that_reach_it() -> None:
    found = mean_by_token([torch.tensor([1.0, 5.0]), torch.tensor([2.0, 7.0, 9.0]), torch.tensor([6.0])], GROUPS)
    assert [(at.token, at.figure.value, at.n) for at in found] == [(1, 3.0, 3), (2, 6.0, 2)]
    spread = float(torch.tensor([1.0, 2.0, 6.0]).var()) ** 0.5  # a mean of three prompts: Student's interval
    assert found[0].figure.high == pytest.approx(3 + stdtrit(2, 0.975) * spread / math.sqrt(3))


def test_recovery_is_0_at_the_start_and_1_at_the_goal() -> None:
    start = [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 2.0, 1.0])]
    steered = [torch.tensor([0.0, 2.0, 6.0]), torch.tensor([0.0, 2.0, 4.0])]
    found = recovery_by_token(steered, start, ["a", "b"])
    assert [at.figure.value for at in found] == [1.0, 0.0, -1.0]
    assert all(at.figure.low <= at.figure.value <= at.figure.high for at in found)


def test_preference_left_is_1_where_nothing_changed_and_unknown_where_there_was_none() -> None:
    before = [4.0, 5.0, 6.0]
    assert list(preference_left(before, before, GROUPS)) == pytest.approx([1.0] * 3)
    assert preference_left([-2.0, -2.5, -3.0], before, GROUPS).value == pytest.approx(-0.5)
    assert math.isnan(preference_left(before, [-1.0, 0.1, 1.0], GROUPS).value)


def test_ratio_of_sums_has_the_jackknife_interval_written_out() -> None:
    over, under, groups = [1.0, 2.0, 4.0, 1.0], [2.0, 3.0, 5.0, 4.0], ["a", "a", "b", "c"]
    without = torch.tensor(
        [(4 + 1) / (5 + 4), (1 + 2 + 1) / (2 + 3 + 4), (1 + 2 + 4) / (2 + 3 + 5)], dtype=torch.float64
    )
    reach = float(stdtrit(2, 0.975)) * math.sqrt(2 / 3 * float((without - without.mean()).square().sum()))
    assert list(ratio_of_sums(over, under, groups)) == pytest.approx([8 / 14, 8 / 14 - reach, 8 / 14 + reach])


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="as many names of prompts as responses, got 1 and 2"):
        mean_by_token([torch.ones(2), torch.ones(2)], ["a"])
    with pytest.raises(ValueError, match="columns of one length, got 2, 1 and 2"):
        ratio_of_sums([1.0, 2.0], [1.0], ["a", "b"])
