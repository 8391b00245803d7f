"""Resamples of whole prompts, and percentile intervals of them."""

import math

import numpy as np
import pytest
import torch

from tiltmeter.stats.bootstrap import percentile_interval, prompt_resamples


def names(n: int) -> list[str]:
    return [str(i) for i in range(n)]


def test_resamples_are_cut_into_chunks_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(10.0, dtype=torch.float64)
    sizes: list[int] = []

    def mean(weights: torch.Tensor) -> torch.Tensor:
        sizes.append(len(weights))
        assert torch.equal(weights.sum(1), torch.full((len(weights),), 10.0, dtype=torch.float64))
        return (weights @ x / weights.sum(1))[:, None]

    first = prompt_resamples(mean, names(10), n_resamples=1000, seed=4)
    monkeypatch.setattr("tiltmeter.stats.bootstrap._WEIGHTS_AT_A_TIME", 3000)
    assert torch.equal(prompt_resamples(mean, names(10), n_resamples=1000, seed=4), first)
    assert sizes == [1, 1000, 1, 300, 300, 300, 100]
    assert not torch.equal(prompt_resamples(mean, names(10), n_resamples=1000, seed=5), first)


def test_rows_of_one_prompt_are_drawn_together_and_the_first_line_is_all_rows() -> None:
    drawn = prompt_resamples(lambda w: w, [str(i // 4) for i in range(12)], n_resamples=50)
    assert torch.equal(drawn[0], torch.ones(12, dtype=torch.float64))
    assert torch.equal(drawn[:, ::4].repeat_interleave(4, dim=1), drawn)


def test_the_interval_is_numpys_quantiles() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 1)))
    (figure,) = prompt_resamples(lambda w: w @ x / w.sum(1, keepdim=True), names(40)).T
    found = percentile_interval(figure)
    assert found.value == pytest.approx(float(x.mean()))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(figure[1:].numpy(), [0.025, 0.975])))


def test_what_cannot_be_resampled_is_refused_or_infinite() -> None:
    assert percentile_interval(prompt_resamples(lambda w: w[:, :1], ["a", "a"])[:, 0]) == (1.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one row"):
        prompt_resamples(lambda w: w, [])
