"""How often intervals hold the truth, by simulation: figures of rows under the jackknife, and shares."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.calibration.coverage import coverage, monte_carlo_band, prompt_names
from tiltmeter.consistency import shift_shares_of_gram
from tiltmeter.energy_distance import energy_kernel
from tiltmeter.spectra import leading_energies_of_gram
from tiltmeter.stats.jackknife import (
    SHARE,
    SQUARE,
    Interval,
    cluster_mean_interval,
    jackknife_interval,
    jackknife_intervals,
)
from tiltmeter.stats.proportions import share_interval

pytestmark = pytest.mark.slow
N_SETS, D = 300, 32


def rows(n: int, f: float, seed: int) -> Tensor:
    """Rows of which the share f of energy is one constant shift."""
    noise = torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / D**0.5
    noise[:, 0] += (f / (1 - f)) ** 0.5
    return noise


def share_of_rows(n: int, f: float, seed: int) -> Interval:
    x = rows(n, f, seed)
    return jackknife_interval(shift_shares_of_gram(x @ x.T), prompt_names(n), second_order=True, scale=SHARE)


@pytest.mark.parametrize("n", [16, 64, 200])
@pytest.mark.parametrize("f", [0.0, 0.02, 0.08, 0.5, 0.9])
def test_intervals_of_the_shift_share(f: float, n: int) -> None:
    """The truth is f's mean over as many rows, f + (1 − f)/N. Where there is no shift the interval may be wide, never narrow."""
    found = coverage(lambda seed: share_of_rows(n, f, seed), f + (1 - f) / n, n_sets=N_SETS)
    low, high = monte_carlo_band(0.93, 0.97 if f >= 0.5 else 1.0, n_sets=N_SETS)
    assert low <= found <= high, found


@pytest.mark.parametrize("n", [16, 64])
def test_intervals_of_the_first_directions_energy(n: int) -> None:
    def interval(seed: int) -> Interval:
        x = rows(n, 0.6, seed)
        return jackknife_intervals(leading_energies_of_gram(x @ x.T), prompt_names(n), scale=SHARE)[0]

    truth = float(np.mean([interval(10**6 + seed).value for seed in range(1000)]))
    low, high = monte_carlo_band(0.93, 0.97, n_sets=N_SETS)
    assert low <= coverage(interval, truth, n_sets=N_SETS) <= high


@pytest.mark.parametrize("n", [16, 64])
def test_intervals_of_the_length_of_a_mean(n: int) -> None:
    def interval(seed: int) -> Interval:
        x = rows(n, 0.5, seed)
        return jackknife_interval(
            lambda w: (w @ x / w.sum(1, keepdim=True)).norm(dim=1), prompt_names(n), second_order=True, scale=SQUARE
        )

    truth = float(np.mean([interval(10**6 + seed).value for seed in range(1000)]))
    low, high = monte_carlo_band(0.93, 0.97, n_sets=N_SETS)
    assert low <= coverage(interval, truth, n_sets=N_SETS) <= high


def test_intervals_of_the_distance_left_between_clouds() -> None:
    """Share of an energy distance that is left, as section clouds has it."""

    def interval(seed: int) -> Interval:
        x, moved, y = rows(64, 0.0, seed), rows(64, 0.3, seed + 10**7), rows(64, 0.0, seed + 2 * 10**7)
        near, far = energy_kernel(moved, y), energy_kernel(moved + 0.5, x)
        return jackknife_interval(lambda w: ((w @ near) * w).sum(1) / ((w @ far) * w).sum(1), prompt_names(64))

    truth = float(np.mean([interval(10**6 + seed).value for seed in range(1000)]))
    low, high = monte_carlo_band(0.93, 0.97, n_sets=N_SETS)
    assert low <= coverage(interval, truth, n_sets=N_SETS) <= high


@pytest.mark.parametrize("n", [16, 64, 200])
def test_intervals_of_means_and_of_ratios_of_sums(n: int) -> None:
    def mean(seed: int) -> Interval:
        return cluster_mean_interval(np.random.default_rng(seed).normal(3, 2, n).tolist(), prompt_names(n))

    def ratio(seed: int) -> Interval:
        rng = np.random.default_rng(seed)
        base = torch.from_numpy(rng.uniform(1, 5, n))
        kl = base * torch.from_numpy(rng.normal(0.6, 0.2, n))
        return jackknife_interval(lambda w: 1 - (w @ kl) / (w @ base), prompt_names(n))

    low, high = monte_carlo_band(0.93, 0.97, n_sets=N_SETS)
    for interval, truth in ((mean, 3.0), (ratio, 0.4)):
        assert low <= coverage(interval, truth, n_sets=N_SETS) <= high


@pytest.mark.parametrize("n", [8, 16, 64, 128])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.98, 1.0])
def test_intervals_of_shares(p: float, n: int) -> None:
    """At least 93 %, and never of width 0."""

    def interval(seed: int) -> Interval:
        found = share_interval((np.random.default_rng(seed).random(n) < p).astype(float).tolist(), prompt_names(n))
        assert found.high > found.low
        return found

    assert coverage(interval, p, n_sets=N_SETS) >= monte_carlo_band(0.93, 1.0, n_sets=N_SETS)[0]


@pytest.mark.parametrize("n_prompts", [16, 64])
def test_intervals_of_shares_of_several_answers_a_prompt(n_prompts: int) -> None:
    """Four answers to a prompt whose own share is drawn from a beta distribution of mean .7."""

    def interval(seed: int) -> Interval:
        rng = np.random.default_rng(seed)
        own = np.repeat(rng.beta(1.4, 0.6, n_prompts), 4)
        answers = (rng.random(4 * n_prompts) < own).astype(float)
        return share_interval(answers.tolist(), prompt_names(n_prompts, rows_each=4))

    assert coverage(interval, 0.7, n_sets=N_SETS) >= monte_carlo_band(0.93, 1.0, n_sets=N_SETS)[0]
