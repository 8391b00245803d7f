from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_modules.reference import cached_reference
from tiltmeter.batch import TokenizedPair
from tiltmeter.reference_cache import ReferenceCache

PAIRS = [TokenizedPair([1, i], [i, 2], [i + 1, 3, 2]) for i in range(20)]
TRUTH = -torch.arange(40, dtype=torch.float64).reshape(20, 2)


class Model:
    """Stands for the reference: remembers which rows it was asked for."""

    def __init__(self, shift: float = 0.0) -> None:
        self.asked: list[int] = []
        self.shift = shift

    def __call__(self, rows: Sequence[int]) -> Tensor:
        self.asked += rows
        table = torch.full((20, 2), torch.nan)
        table[list(rows)] = (TRUTH[list(rows)] + self.shift).float()
        return table


def find(
    cache: ReferenceCache | None, rows: Sequence[int], model: Model, first_step: Sequence[int] = ()
) -> tuple[Tensor, str]:
    return cached_reference(
        PAIRS,
        rows,
        cache=cache,
        compute=model,
        precision="32-true",
        share=lambda value: value,
        is_first=True,
        first_step=first_step,
    )


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    return ReferenceCache(tmp_path, {"weights": "a"})


def test_a_second_run_recomputes_a_sample_only(cache: ReferenceCache) -> None:
    find(cache, range(20), Model())
    again = Model()
    table, line = find(cache, range(20), again)
    torch.testing.assert_close(table, TRUTH)
    assert len(again.asked) == 8
    assert "20 pairs found" in line
    assert "0 computed" in line


def test_only_missing_rows_are_computed_and_then_kept(cache: ReferenceCache) -> None:
    find(cache, range(5), Model())
    model = Model()
    table, line = find(cache, range(3, 12), model)
    assert sorted(set(model.asked) - {3, 4}) == list(range(5, 12))
    torch.testing.assert_close(table[3:12], TRUTH[3:12])
    assert table[:3].isnan().all()
    assert "2 pairs found" in line
    assert "7 computed" in line
    assert "12 pairs found" in find(cache, range(12), Model())[1]


def test_a_cache_that_disagrees_with_the_model_is_not_used(cache: ReferenceCache) -> None:
    find(cache, range(20), Model(shift=0.5))
    table, line = find(cache, range(20), Model())
    torch.testing.assert_close(table, TRUTH)
    assert "cache not used: recomputed rows differ by" in line
    assert "20 pairs found" in find(cache, range(20), Model())[1]


def test_the_first_step_is_always_computed_by_itself_and_stands_for_the_sample(cache: ReferenceCache) -> None:
    model = Model()
    find(cache, range(20), model, first_step=[7, 3])
    assert model.asked[:2] == [7, 3]
    assert sorted(model.asked) == list(range(20))
    again = Model(shift=1e-6)
    table, line = find(cache, range(20), again, first_step=[7, 3])
    assert again.asked == [7, 3]
    assert "20 pairs found" in line
    fresh = torch.zeros(20, dtype=torch.bool)
    fresh[[3, 7]] = True
    shifted = (TRUTH + 1e-6).float().double()
    assert torch.equal(table, torch.where(fresh[:, None], shifted, TRUTH)), "its own values, the kept ones for the rest"
    wrong = Model(shift=0.5)
    table, line = find(cache, range(20), wrong, first_step=[7, 3])
    assert "cache not used: recomputed rows differ by" in line
    assert sorted(wrong.asked) == list(range(20))
    torch.testing.assert_close(table, TRUTH + 0.5)


def test_without_a_cache_everything_is_computed() -> None:
    table, line = find(None, [1, 2], Model())
    assert table[0].isnan().all()
    assert line == "Reference: 2 pairs computed"
