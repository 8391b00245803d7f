from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.dpo import DPOModule
from lightning_modules.reference import MicroBatches, cached_reference
from tests.tiny_models import ARCHITECTURES, fit, lightning_warnings, make_data
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.pairs.reference_cache import ReferenceCache

PAIRS = [TokenizedPair([1, i], [i, 2], [i + 1, 3, 2]) for i in range(20)]
TRUTH = -torch.arange(40, dtype=torch.float64).reshape(20, 2)


class Model:
    """Stands for the reference: remembers which rows it was asked for, and rounds by the micro-batch, as 16 bit do."""

    def __init__(self, shift: float = 0.0) -> None:
        self.asked: list[int] = []
        self.shift = shift

    def __call__(self, rows: Sequence[int]) -> Tensor:
        return self.run(micro_batches(rows))

    def run(self, batches: MicroBatches) -> Tensor:
        table = torch.full((20, 2), torch.nan)
        for batch in batches:
            self.asked += batch
            for place, row in enumerate(batch):
                table[row] = (TRUTH[row] + self.shift + 1e-3 * len(batch) + 1e-4 * place).float()
        return table


def micro_batches(rows: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(rows[at : at + 3]) for at in range(0, len(rows), 3)]


def find(
    cache: ReferenceCache | None, rows: Sequence[int], model: Model, first_step: Sequence[int] = ()
) -> tuple[Tensor, str]:
    return cached_reference(
        PAIRS,
        rows,
        cache=cache,
        compute=model,
        micro_batches=micro_batches,
        recompute=model.run,
        share=lambda value: value,
        is_first=True,
        first_step=first_step,
    )


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    return ReferenceCache(tmp_path, {"weights": "a"})


def test_a_second_run_recomputes_whole_micro_batches_only_and_finds_the_same_bits(cache: ReferenceCache) -> None:
    before, _ = find(cache, range(20), Model())
    again = Model()
    table, line = find(cache, range(20), again)
    assert torch.equal(table, before)
    assert again.asked == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert "20 pairs found" in line
    assert "0 computed" in line


def test_a_run_of_other_rows_in_other_micro_batches_finds_the_same_bits(cache: ReferenceCache) -> None:
    before, _ = find(cache, range(20), Model())
    table, line = find(cache, range(4, 20), Model(), first_step=[5, 9])
    assert "16 pairs found" in line
    assert "not used" not in line
    rest = [row for row in range(4, 20) if row not in (5, 9)]
    assert torch.equal(table[rest], before[rest])


def test_only_missing_rows_are_computed_and_then_kept(cache: ReferenceCache) -> None:
    find(cache, range(5), Model())
    model = Model()
    table, line = find(cache, range(3, 12), model)
    assert sorted(set(model.asked) - set(range(5))) == list(range(5, 12))
    torch.testing.assert_close(table[3:12], TRUTH[3:12], rtol=0, atol=5e-3)
    assert table[:3].isnan().all()
    assert "2 pairs found" in line
    assert "7 computed" in line
    assert "12 pairs found" in find(cache, range(12), Model())[1]


@pytest.mark.parametrize("shift", [0.5, 1e-5])
def test_a_cache_that_differs_from_the_model_in_any_bit_is_not_used_and_nothing_of_it_is_kept(
    shift: float, cache: ReferenceCache
) -> None:
    find(cache, range(20), Model(shift=shift))
    table, line = find(cache, range(15), Model())
    assert torch.equal(table[:15], Model()(range(15)).double()[:15])
    assert "cache not used: recomputed rows differ by" in line
    assert "15 pairs found" in find(cache, range(20), Model())[1], "the five others were wrong too"


def test_rows_none_of_whose_micro_batches_is_whole_are_not_believed(cache: ReferenceCache) -> None:
    find(cache, range(20), Model())
    some = [0, 3, 6]
    lacking = cached_reference(
        [PAIRS[row] for row in some],
        range(3),
        cache=cache,
        compute=lambda rows: Model()(some)[some],
        micro_batches=micro_batches,
        recompute=lambda batches: pytest.fail("nothing to run"),
        share=lambda value: value,
        is_first=True,
    )
    assert "3 computed (cache not used: no micro-batch of it is whole" in lacking[1]


def test_the_first_step_is_always_computed_by_itself(cache: ReferenceCache) -> None:
    model = Model()
    before, _ = find(cache, range(20), model, first_step=[7, 3])
    assert model.asked[:2] == [7, 3]
    assert sorted(model.asked) == list(range(20))
    again = Model()
    table, line = find(cache, range(20), again, first_step=[7, 8])
    assert again.asked[:2] == [7, 8]
    assert "20 pairs found" in line
    assert torch.equal(table[[7, 8]], Model()([7, 8]).double()[[7, 8]]), "its own values"
    others = [row for row in range(20) if row not in (7, 8)]
    assert torch.equal(table[others], before[others]), "the kept ones for the rest"


def test_without_a_cache_everything_is_computed() -> None:
    table, line = find(None, [1, 2], Model())
    assert table[0].isnan().all()
    assert not table[1:3].isnan().any()
    assert line == "Reference: 2 pairs computed"


@lightning_warnings
def test_a_run_in_16_bit_finds_its_reference_to_the_last_bit_and_one_of_another_configuration_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reference(**options: Any) -> tuple[Tensor, str]:
        module = DPOModule(learning_rate=1e-3)
        data = make_data(12, **options)
        fit(module, data, family="llama", dtype="float32", precision="bf16-mixed", reference_cache=tmp_path)
        return module.reference["val"], capsys.readouterr().out

    before, said = reference()
    assert "0 pairs found" in said
    found, said = reference(seed=5, pairs_per_step=4, tokens_per_micro_batch=64)
    assert said.count(" 0 computed") == 2
    assert torch.equal(found, before)
    monkeypatch.setitem(ARCHITECTURES["llama"], "rms_norm_eps", 1e-2)
    other, said = reference()
    assert said.count(": 0 pairs found") == 2
    assert not torch.allclose(other, before, rtol=1e-4)
