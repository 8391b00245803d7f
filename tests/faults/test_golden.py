"""Row F31 of the fault list: a hundred steps are the same however they are cut and by how many processes they are taken."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.ddp_strategy import InPlaceDDPStrategy
from lightning_modules.dpo import DPOModule
from lightning_modules.fsdp_strategy import FSDP2Strategy
from tests.callbacks.memory_logger import MemoryLogger
from tests.processes import codes, run_on_ranks
from tests.tiny_models import fit, lightning_warnings, make_data

pytestmark = [pytest.mark.slow, lightning_warnings]
GOLDEN = Path(__file__).with_name("golden_losses.txt")


def losses(*, tokens_per_micro_batch: int = 10**6, **options: Any) -> list[float]:
    """Of a hundred steps of five pairs, which two processes share unevenly."""
    logger = MemoryLogger()
    data = make_data(24, pairs_per_step=5, tokens_per_micro_batch=tokens_per_micro_batch)
    fit(DPOModule(learning_rate=1e-3), data, family="gpt2", dtype="float32", max_steps=100, max_epochs=25, logger=logger,
        log_every_n_steps=1, **options)  # fmt: skip
    return logger.of("train/loss")


def losses_of_two(rank: int, folder: Path) -> None:
    strategies = {"ddp": InPlaceDDPStrategy(), "fsdp": FSDP2Strategy()}
    found = {name: losses(devices=2, strategy=strategy) for name, strategy in strategies.items()}
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def golden() -> list[float]:
    """Written by ``losses()``; held to 1e-6, for another processor sums in another order."""
    values = [float(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    assert values[0] == pytest.approx(math.log(2))
    assert values[-1] < 0.5, "a run that learns nothing shows nothing"
    return values


def test_a_hundred_losses_are_those_of_the_file_in_micro_batches_of_any_size(golden: list[float]) -> None:
    assert losses(tokens_per_micro_batch=60) == pytest.approx(golden, rel=0, abs=1e-6)


def test_two_processes_have_the_losses_of_one(golden: list[float], tmp_path: Path) -> None:
    ended = run_on_ranks(losses_of_two, tmp_path)
    assert codes(ended) == [0, 0], ended
    found = json.loads((tmp_path / "losses.json").read_text(encoding="utf-8"))
    for name in ("ddp", "fsdp"):
        assert found[name] == pytest.approx(golden, rel=0, abs=1e-6), name
