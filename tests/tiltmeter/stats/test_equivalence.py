import math

import pytest
import torch

from tiltmeter.stats.equivalence import equivalence
from tiltmeter.stats.jackknife import COSINE, NO_INTERVAL, Interval, cluster_mean_interval, jackknife_interval


def test_it_is_the_interval_of_ninety_percent_inside_the_margins() -> None:
    x = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    names = [str(i) for i in range(30)]
    found = cluster_mean_interval(x.tolist(), names)
    narrow = cluster_mean_interval(x.tolist(), names, level=0.9)
    for margin in (0.1, 0.2, 0.3, 0.4, 0.6, 1.0):
        inside = -margin < narrow.low and narrow.high < margin
        assert equivalence(found, 30, low=-margin, high=margin).is_equivalent == inside


def test_at_a_margin_p_is_a_half_and_one_margin_may_be_infinite() -> None:
    found = Interval(0.5, 0.3, 0.7)
    assert equivalence(found, 20, low=0.5).p_value == pytest.approx(0.5)
    assert equivalence(found, 20, low=0.5, high=9.0).p_value == pytest.approx(0.5)
    assert equivalence(Interval(1.0, 1.0, 1.0), 20, low=0.5).p_value == 0
    assert equivalence(Interval(0.2, 0.2, 0.2), 20, low=0.5).p_value == 1


def test_on_a_scale_it_is_symmetric_there() -> None:
    values = torch.linspace(0.2, 0.9, 15, dtype=torch.float64)
    names = [str(i) for i in range(15)]
    found, narrow = (
        jackknife_interval(lambda w: w @ values / w.sum(1), names, level=level, scale=COSINE) for level in (0.95, 0.9)
    )
    assert equivalence(found, 15, low=narrow.low, scale=COSINE).p_value == pytest.approx(0.05)


def test_what_has_no_number_is_not_equivalent_and_wrong_margins_are_refused() -> None:
    found = equivalence(NO_INTERVAL, 20, low=0.0)
    assert math.isnan(found.p_value)
    assert not found.is_equivalent
    for low, high in ((1.0, 0.0), (-math.inf, math.inf)):
        with pytest.raises(ValueError, match="expected low below high"):
            equivalence(Interval(0.0, 0.0, 0.0), 20, low=low, high=high)
