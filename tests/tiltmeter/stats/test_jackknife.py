"""The jackknife against a loop that leaves rows out, and Student's interval; what has no interval."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from tiltmeter.geometry.consistency import (
    in_sample_cosines,
    leave_one_out_cosines,
    mean_cosine_intervals,
    shift_shares_of_gram,
)
from tiltmeter.geometry.spectra import leading_energies_of_gram, singular_values
from tiltmeter.stats.jackknife import (
    COSINE,
    LINEAR,
    LOG_ODDS,
    SHARE,
    SQUARE,
    Scale,
    cluster_mean_interval,
    jackknife_interval,
    jackknife_intervals,
)


def rows(n: int, d: int = 6, *, shift: float = 0.5, seed: int = 0) -> torch.Tensor:
    return shift + torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_variance_is_that_of_a_loop_over_clusters() -> None:
    x, prompts = rows(30), [str(i // 3) for i in range(30)]
    kept = [x[[p != name for p in prompts]].mean(0).norm() for name in dict.fromkeys(prompts)]
    variance = 9 / 10 * sum((one - sum(kept) / 10) ** 2 for one in kept)
    reach = student.ppf(0.975, 9) * math.sqrt(variance)
    found = jackknife_interval(lambda w: (w @ x / w.sum(1, keepdim=True)).norm(dim=1), prompts)
    assert found == pytest.approx(
        (float(x.mean(0).norm()), float(x.mean(0).norm()) - reach, float(x.mean(0).norm()) + reach)
    )


def test_a_mean_has_students_interval() -> None:
    x = np.random.default_rng(0).normal(size=12)
    reach = student.ppf(0.975, 11) * x.std(ddof=1) / math.sqrt(12)
    found = cluster_mean_interval(x.tolist(), [str(i) for i in range(12)])
    assert found == pytest.approx((x.mean(), x.mean() - reach, x.mean() + reach))


def test_figures_with_all_weights_one_are_the_figures_of_the_rows() -> None:
    x = rows(30, 8)
    once = torch.ones(1, 30, dtype=torch.float64)
    share = 30 * x.mean(0).square().sum() / x.square().sum()
    assert float(shift_shares_of_gram(x @ x.T)(once)) == pytest.approx(float(share), abs=1e-12)
    sigma = singular_values(x)
    expected = [float(sigma[0] ** 2 / sigma.square().sum()), float((sigma[1] / sigma[0]) ** 2)]
    assert leading_energies_of_gram(x @ x.T)(once)[0].tolist() == pytest.approx(expected, abs=1e-12)
    found = mean_cosine_intervals(x, [str(i) for i in range(30)])
    assert found["in_sample"].value == pytest.approx(float(in_sample_cosines(x).mean()), abs=1e-12)
    assert found["leave_one_out"].value == pytest.approx(float(leave_one_out_cosines(x).mean()), abs=1e-12)


def test_leaving_a_row_out_is_having_one_less() -> None:
    x = rows(20, 40)
    without = torch.ones(1, 20, dtype=torch.float64)
    without[0, 7] = 0
    fewer = x[[i for i in range(20) if i != 7]]
    for figure in (shift_shares_of_gram, leading_energies_of_gram):
        same = figure(fewer @ fewer.T)(torch.ones(1, 19, dtype=torch.float64))
        assert torch.allclose(figure(x @ x.T)(without), same, atol=1e-10)


@pytest.mark.parametrize("scale", [LINEAR, COSINE, SHARE, LOG_ODDS, SQUARE])
def test_scales_rise_and_lead_back(scale: Scale) -> None:
    x = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    there = scale.to(x)
    assert (there.diff() > 0).all()
    assert torch.allclose(scale.back(there), x)


def test_intervals_hold_their_estimate_and_stay_within_the_scale() -> None:
    x = rows(16, 4, shift=3.0)
    found = jackknife_interval(
        shift_shares_of_gram(x @ x.T), [str(i) for i in range(16)], second_order=True, scale=SHARE
    )
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_figures_without_enough_clusters_have_no_finite_interval() -> None:
    assert jackknife_interval(lambda w: w.sum(1), ["a", "a"])[1:] == (-math.inf, math.inf)
    assert cluster_mean_interval([2.0, 2.0], ["a", "b"]) == (2.0, 2.0, 2.0)
    nothing = torch.full((3, 1), math.nan, dtype=torch.float64)
    assert all(map(math.isnan, jackknife_intervals(lambda w: w @ nothing, ["a", "b", "c"])[0]))
    with pytest.raises(ValueError, match="at least one row"):
        jackknife_interval(lambda w: w.sum(1), [])
    with pytest.raises(ValueError, match="of one length above 0, got 0 and 0"):
        cluster_mean_interval([], [])
