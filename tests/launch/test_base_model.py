"""Bases are found again by what they learned from."""

from pathlib import Path

import pytest

from launch.base_model import base_folder
from tests.cli import TINY, composed
from tests.tiny_models import ARCHITECTURES, make_data
from tiltmeter.models.causal_lm import CausalLM


def folder(*options: str) -> Path:
    data = make_data(4)
    model = CausalLM(init="random", architecture={"model_type": "llama", **ARCHITECTURES["llama"]})
    assert data.tokenizer is not None
    return base_folder(composed(*TINY, *options), model, data.tokenizer, data)


@pytest.mark.parametrize("option", ["trainer.limit_train_batches=2", "base.max_epochs=3"])
def test_a_base_that_learned_from_less_is_another_base(option: str) -> None:
    assert folder(option) != folder()


def test_what_a_run_does_after_its_base_makes_no_other_base() -> None:
    run = (
        "trainer.max_steps=7",
        "trainer.max_epochs=9",
        "trainer.max_time=00:00:00:09",
        "trainer.limit_val_batches=1",
        "++trainer.devices=2",
        "seed=4",
    )
    assert folder(*run) == folder()
