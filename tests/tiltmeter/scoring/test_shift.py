"""Share of a change that is kept under shift, against plain means and a loop over prompts that are left out."""

import math

import pytest

from tiltmeter.scoring.shift import share_kept


def test_share_kept_is_the_ratio_of_means_and_its_interval_leaves_out_prompts_in_both() -> None:
    shifted, usual = [1.0, 3.0, 2.0, 4.0], [4.0, 6.0, 5.0, 7.0, 6.0]
    groups, others = ["a", "a", "b", "c"], ["a", "b", "b", "c", "d"]
    found = share_kept(shifted, groups, usual, others)
    assert found.value == pytest.approx((10 / 4) / (28 / 5))
    left = []
    for name in "abcd":
        one = [x for x, group in zip(shifted, groups, strict=True) if group != name]
        two = [x for x, group in zip(usual, others, strict=True) if group != name]
        left.append((sum(one) / len(one)) / (sum(two) / len(two)))
    mean = sum(left) / 4
    error = math.sqrt(3 / 4 * sum((x - mean) ** 2 for x in left))
    assert found.high - found.value == pytest.approx(3.182446 * error, rel=1e-5), "Student's quantile with 3 degrees"


def test_nothing_is_kept_of_a_change_that_is_not_told_from_zero() -> None:
    names = list("abcdef")
    assert math.isnan(share_kept([1.0] * 6, names, [1.0, -1.0, 1.0, -1.0, 1.0, -1.0], names).value)
    assert math.isnan(share_kept([1.0], ["a"], [1.0, 2.0], ["a", "b"]).value), "one prompt has no interval"
    assert share_kept([-1.0] * 6, names, [2.0, 2.1, 2.2, 2.0, 2.1, 2.2], names).value == pytest.approx(-1 / 2.1)


def test_names_have_to_be_as_many_as_pairs() -> None:
    with pytest.raises(ValueError, match="share_kept: expected a name for each pair, got 1 for 2 and 1 for 1"):
        share_kept([1.0, 2.0], ["a"], [1.0], ["a"])
