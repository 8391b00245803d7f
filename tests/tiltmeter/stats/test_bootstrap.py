import math

import numpy as np
import pytest
import torch

from tiltmeter.stats.bootstrap import (
    Interval,
    cluster_interval,
    cluster_intervals,
    cluster_mean_interval,
    paired_difference_interval,
)

WORLDS = 1500


def names(n: int) -> list[str]:
    return [str(i) for i in range(n)]


def coverage(intervals: list[Interval], truth: float) -> float:
    return sum(i.low <= truth <= i.high for i in intervals) / len(intervals)


def test_intervals_of_gaussian_means_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(3, 2, (WORLDS, 80))
    options = {"n_resamples": 1000}
    found = [cluster_mean_interval(x.tolist(), names(80), seed=i, **options) for i, x in enumerate(draws)]
    assert 0.93 <= coverage(found, 3) <= 0.97


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    """Twenty prompts of four equal pairs are twenty observations, not eighty."""
    rng = np.random.default_rng(1)
    prompts = [str(i // 4) for i in range(80)]
    worlds = [np.repeat(rng.normal(0, 1, 20), 4).tolist() for _ in range(400)]
    clustered = [cluster_mean_interval(x, prompts, n_resamples=1000, seed=i) for i, x in enumerate(worlds)]
    naive = [cluster_mean_interval(x, names(80), n_resamples=1000, seed=i) for i, x in enumerate(worlds)]
    assert 0.89 <= coverage(clustered, 0) <= 0.97
    assert coverage(naive, 0) < 0.75


def test_intervals_of_any_statistic_cover_the_truth() -> None:
    """Here a ratio of means, whose truth is 2."""
    rng = np.random.default_rng(2)
    found = []
    for world in range(400):
        base = torch.from_numpy(rng.normal(5, 1, 100))
        gain = 2 * base + torch.from_numpy(rng.normal(0, 1, 100))
        found.append(
            cluster_interval(lambda w, a=gain, b=base: (w @ a) / (w @ b), names(100), n_resamples=1000, seed=world)
        )
    assert 0.92 <= coverage(found, 2) <= 0.98


def test_the_general_interval_agrees_with_that_of_means() -> None:
    x = np.random.default_rng(3).normal(0, 1, 60)
    clusters = [str(i % 25) for i in range(60)]
    mean = cluster_mean_interval(x.tolist(), clusters, n_resamples=4000)
    general = cluster_interval(lambda w: w @ torch.from_numpy(x) / w.sum(1), clusters, n_resamples=4000)
    assert general.value == pytest.approx(mean.value)
    assert (general.low, general.high) == pytest.approx((mean.low, mean.high), abs=0.03)


def test_resamples_are_cut_into_chunks_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(10.0, dtype=torch.float64)
    sizes: list[int] = []

    def mean(weights: torch.Tensor) -> torch.Tensor:
        sizes.append(len(weights))
        assert torch.equal(weights.sum(1), torch.full((len(weights),), 10.0, dtype=torch.float64))
        return weights @ x / weights.sum(1)

    first = cluster_interval(mean, names(10), n_resamples=1000, seed=4)
    monkeypatch.setattr("tiltmeter.stats.bootstrap._WEIGHTS_AT_A_TIME", 3000)
    assert cluster_interval(mean, names(10), n_resamples=1000, seed=4) == first
    assert sizes == [1, 1000, 1, 300, 300, 300, 100]
    assert cluster_interval(mean, names(10), n_resamples=1000, seed=5) != first


def test_a_paired_difference_is_narrower_than_its_sides() -> None:
    rng = np.random.default_rng(5)
    base = rng.normal(0, 10, 50)
    policy = base + rng.normal(1, 0.1, 50)
    paired = paired_difference_interval(policy.tolist(), base.tolist(), names(50))
    alone = cluster_mean_interval(base.tolist(), names(50))
    assert paired.value == pytest.approx(float((policy - base).mean()))
    assert paired.high - paired.low < 0.1
    assert alone.high - alone.low > 3


def test_what_cannot_be_resampled_is_refused_or_infinite() -> None:
    one = cluster_interval(lambda w: w.sum(1), ["a", "a"])
    assert one == (2.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one row"):
        cluster_interval(lambda w: w.sum(1), [])
    with pytest.raises(ValueError, match="both sides, got 1 and 2"):
        paired_difference_interval([1.0], [1.0, 2.0], ["a"])


def test_several_figures_at_once_are_each_as_if_alone() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, 2] = math.nan
    prompts = [str(i // 2) for i in range(40)]
    together = cluster_intervals(lambda w: w @ x / w.sum(1, True), prompts, n_resamples=300)
    for column, found in enumerate(together[:2]):
        assert found == pytest.approx(cluster_interval(lambda w: w @ x[:, column] / w.sum(1), prompts, n_resamples=300))  # noqa: B023
    assert all(math.isnan(bound) for bound in together[2])
    assert cluster_intervals(lambda w: w @ x / w.sum(1, True), ["a"] * 40)[0][1:] == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one row"):
        cluster_intervals(lambda w: w, [])
