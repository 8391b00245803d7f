import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.geometry.consistency import (
    cosine,
    in_sample_cosines,
    leave_one_out_cosines,
    split_half,
    split_half_of_gram,
)


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cosines_are_those_worked_out_by_hand() -> None:
    rows = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    assert_close(in_sample_cosines(rows), torch.full((2,), math.sqrt(0.5), dtype=torch.float64))
    assert leave_one_out_cosines(rows).tolist() == [0, 0]
    assert split_half(rows, n_splits=3).cosine_of_means.tolist() == [0, 0, 0]


@settings(deadline=None)
@given(st.integers(2, 20), st.integers(1, 8), st.integers(0, 99))
def test_leave_one_out_cosine_is_with_the_mean_of_the_other_rows(n: int, d: int, seed: int) -> None:
    rows = noise(n, d, seed)
    expected = [cosine(rows[i], torch.cat([rows[:i], rows[i + 1 :]]).mean(0)) for i in range(n)]
    assert_close(leave_one_out_cosines(rows), torch.stack(expected))
    chunked = [leave_one_out_cosines(part, mean=rows.mean(0), n_rows=n) for part in rows.split(3)]
    assert_close(torch.cat(chunked), torch.stack(expected))


def test_noise_looks_consistent_in_sample_only() -> None:
    n, repeats = 100, 40
    rows = [noise(n, 400, seed) for seed in range(repeats)]
    in_sample = torch.stack([in_sample_cosines(x).mean() for x in rows])
    left_out = torch.stack([leave_one_out_cosines(x).mean() for x in rows])
    halves = torch.stack([split_half(x, n_splits=4).mean_cosine.mean() for x in rows])
    assert float(in_sample.mean()) == pytest.approx(1 / math.sqrt(n), rel=0.02)
    assert abs(float(left_out.mean())) < 3 * float(left_out.std()) / math.sqrt(repeats) + 1e-4
    assert abs(float(halves.mean())) < 0.003


def test_a_shared_direction_is_found_by_all_three() -> None:
    rows = 0.1 * noise(40, 10) + torch.ones(10)
    assert float(in_sample_cosines(rows).mean()) > 0.99
    assert float(leave_one_out_cosines(rows).mean()) > 0.99
    found = split_half(rows, n_splits=5, seed=3)
    assert found.mean_cosine.shape == (5,)
    assert float(found.mean_cosine.min()) > 0.99
    assert float(found.cosine_of_means.min()) > 0.99
    assert torch.equal(found.mean_cosine, split_half(rows, n_splits=5, seed=3).mean_cosine)


def test_halves_from_inner_products_are_those_of_the_rows() -> None:
    n, n_splits = 13, 6
    rows = noise(n, 4) + 0.4
    found = split_half(rows, n_splits=n_splits)
    generator = torch.Generator().manual_seed(0)
    for split in range(n_splits):
        order = torch.randperm(n, generator=generator)
        a, b = rows[order[: n // 2]], rows[order[n // 2 :]]
        across = torch.cat([cosine(a, b.mean(0, keepdim=True)), cosine(b, a.mean(0, keepdim=True))])
        assert_close(found.cosines[split, order], across)
        assert_close(found.mean_cosine[split], across.mean())
        assert_close(found.cosine_of_means[split], cosine(a.mean(0), b.mean(0)))


def test_signs_given_beside_inner_products_are_those_of_the_rows() -> None:
    rows, halves = noise(9, 4) + 0.4, (torch.arange(9) < 4).double()[None]
    signs = torch.tensor([[1.0, -1, 1, 1, -1, -1, 1, -1, 1]], dtype=torch.float64)
    flipped = signs.T * rows
    found = split_half_of_gram(rows @ rows.T, halves, signs)
    expected = split_half_of_gram(flipped @ flipped.T, halves, torch.ones_like(signs))
    assert_close(found.cosines, expected.cosines)
    assert_close(found.cosine_of_means, expected.cosine_of_means)


def test_cosine_of_a_row_without_direction_is_nan() -> None:
    assert in_sample_cosines(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).isnan().all()
    assert leave_one_out_cosines(torch.ones(1, 3)).isnan().all()
    with pytest.raises(ValueError, match="at least two rows, got 1"):
        split_half(torch.ones(1, 3))
    with pytest.raises(ValueError, match="mean and n_rows of all rows, or neither"):
        leave_one_out_cosines(torch.ones(2, 3), n_rows=2)
