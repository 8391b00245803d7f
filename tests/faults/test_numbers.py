"""Rows F16 and F17 of the fault list on two processes: numbers that go wrong on one of them only."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from lightning_modules.ddp_strategy import InPlaceDDPStrategy
from lightning_modules.dpo import DPOModule
from lightning_modules.fsdp_strategy import FSDP2Strategy
from tests.faults.faulty import Kept, poison
from tests.processes import N_RANKS, codes, run_on_ranks
from tests.tiny_models import fit, make_data
from tiltmeter.errors import NumericalStop

pytestmark = pytest.mark.slow
SPIKE = 1e3


def train(rank: int, factor: Any, strategy: Any, n_steps: int = 5, **options: Any) -> Kept:
    module, kept = DPOModule(learning_rate=1e-3, weight_decay=0.1, **options), Kept()
    if rank == 1:
        poison(module, factor)
    data = make_data(12, pairs_per_step=4, tokens_per_micro_batch=60)
    fit(module, data, family="llama", dtype="float32", devices=2, strategy=strategy, max_epochs=40, max_steps=n_steps,
        callbacks=[kept])  # fmt: skip
    return kept


def wrong_on_rank_1(rank: int, folder: Path) -> None:
    found: dict[str, Any] = {}
    for name, strategy in (("ddp", InPlaceDDPStrategy()), ("fsdp", FSDP2Strategy())):
        kept = train(rank, lambda step: math.nan if step == 2 else 1.0, strategy)
        found[name] = {"weights": kept.weights[1:], "moments": kept.moments[1:], "logged": kept.logged[1:]}
    spiky = train(rank, lambda step: SPIKE if step in (10, 70) else 1.0, InPlaceDDPStrategy(), n_steps=73)
    found["spike"] = {"weights": spiky.weights[69:], "logged": [spiky.logged[10], *spiky.logged[69:]]}
    torch.save(found, folder / f"{rank}.pt")
    try:
        train(rank, lambda step: math.nan, InPlaceDDPStrategy(), max_skipped_steps=1)
    except NumericalStop as stop:
        (folder / f"{rank}.stop").write_text(str(stop), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """What each process said and found."""
    ended = run_on_ranks(wrong_on_rank_1, folder)
    assert codes(ended) == [0, 0], ended
    return [one.stdout + one.stderr for one in ended], [
        torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(N_RANKS)
    ]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_is_not_finite_on_one_process_is_skipped_by_both(strategy: str, ranks: Any) -> None:
    for rank in range(N_RANKS):
        run = ranks[1][rank][strategy]
        before, after, later, _ = run["weights"]
        assert_close(after, before, rtol=0, atol=0)
        assert_close(run["moments"][1], run["moments"][0], rtol=0, atol=0)
        assert any(not torch.equal(later[name], after[name]) for name in after)
        assert [row["alarm/skipped_steps"] for row in run["logged"]] == [0, 1, 1, 1]
    if strategy == "ddp":
        assert_close(ranks[1][0]["ddp"]["weights"], ranks[1][1]["ddp"]["weights"], rtol=0, atol=0)


def test_a_spike_on_one_process_is_skipped_by_both_once_there_are_64_steps_to_compare_with(ranks: Any) -> None:
    for rank in range(N_RANKS):
        early, before, spike, after = (ranks[1][rank]["spike"]["logged"][i] for i in (0, 1, 2, 3))
        assert early["alarm/skipped_steps"] == 0, "not active yet"
        assert spike["train/loss"] > 10 * before["train/loss"]
        assert [row["alarm/skipped_steps"] for row in (before, spike, after)] == [0, 1, 1]
        weights = ranks[1][rank]["spike"]["weights"]
        assert_close(weights[1], weights[0], rtol=0, atol=0)
        assert any(not torch.equal(weights[2][name], weights[1][name]) for name in weights[1])
    assert_close(ranks[1][0]["spike"]["weights"], ranks[1][1]["spike"]["weights"], rtol=0, atol=0)


def test_the_first_process_names_the_other_one_s_pairs_and_both_stop_at_the_same_step(ranks: Any, folder: Path) -> None:
    spoken, _ = ranks
    stops = [(folder / f"{rank}.stop").read_text(encoding="utf-8") for rank in range(N_RANKS)]
    assert stops[0] == stops[1]
    assert stops[0].startswith("step 1: loss or gradient not finite (memory/")
    assert "step 2: loss or gradient not finite (memory/" in spoken[0]
    assert "skipped" not in spoken[1]
