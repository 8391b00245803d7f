"""McNemar's exact test against the binomial sum it stands for."""

from math import comb

import pytest

from tiltmeter.stats.paired import more_often


@pytest.mark.parametrize(("more", "less", "same"), [(0, 0, 5), (3, 0, 0), (7, 2, 20), (2, 7, 20), (12, 12, 1)])
def test_the_p_value_is_the_tail_of_the_pairs_that_differ(more: int, less: int, same: int) -> None:
    ones = [1.0] * more + [0.0] * less + [1.0] * same
    others = [0.0] * more + [1.0] * less + [1.0] * same
    n = more + less
    tail = sum(comb(n, k) for k in range(more, n + 1)) / 2**n
    assert more_often(ones, others) == pytest.approx(tail)


def test_outcomes_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="expected outcomes in pairs, got 2 and 1"):
        more_often([1.0, 0.0], [1.0])
