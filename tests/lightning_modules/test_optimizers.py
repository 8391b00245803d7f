"""Optimizers by name: torch's own with the options given, resumed bit for bit, and wrong ones refused at once."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch.testing import assert_close

from lightning_modules.dpo import DPOModule
from lightning_modules.optimizers import OptimizerChoice
from tests.tiny_models import fit, lightning_warnings, make_data
from tiltmeter.errors import UserError

pytestmark = lightning_warnings


def train(max_epochs: int, path: Path | None = None, **options: Any) -> DPOModule:
    module = DPOModule(learning_rate=1e-3, schedule="constant", warmup_share=0.0, **options)
    where = None if path is None else str(path)
    data = make_data(8, pairs_per_step=4)
    dtype = "float32" if module.optimizer.name.endswith("_8bit") else "float64"  # bitsandbytes takes no others
    fit(module, data, family="llama", dtype=dtype, max_epochs=max_epochs, ckpt_path=where)
    return module


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("rmsprop", {"momentum": 0.9, "eps": 1e-6}, torch.optim.RMSprop),
        ("adafactor", {"eps": [None, 1e-2]}, torch.optim.Adafactor),
        ("sgd", {"momentum": 0.5, "nesterov": True}, torch.optim.SGD),
        ("adamw_8bit", {"eps": 1e-6, "min_8bit_size": 256}, bitsandbytes.optim.AdamW8bit),
        ("lion_8bit", {"min_8bit_size": 256}, bitsandbytes.optim.Lion8bit),
    ],
)
def test_a_run_takes_the_optimizer_with_its_options_and_goes_on_bit_for_bit(
    name: str, options: dict[str, Any], kind: type, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {"optimizer": name, "optimizer_options": options}
    train(1, **chosen).trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, whole = train(2, tmp_path / "last.ckpt", **chosen), train(2, **chosen)
    (optimizer,) = resumed.trainer.optimizers
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    for key, value in options.items():
        found = group[key] if key in group else getattr(optimizer.args, key)
        assert found == (tuple(value) if isinstance(value, list) else value)
    has_bytes = any(
        torch.is_tensor(x) and x.dtype == torch.uint8 for state in optimizer.state.values() for x in state.values()
    )
    assert has_bytes == name.endswith("_8bit")
    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "adamv"}, r"module.optimizer: expected one of adamw, adam, .*adamw_8bit.*, got adamv"),
        ({"name": "adamw_8bit"}, r"module.optimizer=adamw_8bit: needs bitsandbytes, .*; pip install bitsandbytes"),
        ({"options": {"momentum": 0.9}}, r"optimizer_options.momentum: adamw has no such option \(it has: amsgrad, "),
        ({"options": {"lr": 1}}, r"module.optimizer_options.lr: set module.learning_rate instead"),
        ({"options": {"eps": -1}}, r"module.optimizer_options: adamw refuses them: Invalid epsilon value"),
        ({"name": "sgd", "betas": (0.9, 0.9)}, r"module.betas: sgd has none"),
        ({"betas": (0.9,)}, r"module.betas: expected two numbers, got 1"),
    ],
)
def test_a_wrong_choice_is_refused_before_there_is_a_model(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str) -> object:
        return None if name == "bitsandbytes" else object()

    monkeypatch.setattr("lightning_modules.optimizers.find_spec", find_spec)
    defaults: dict[str, Any] = {"name": "adamw", "betas": None, "options": {}}
    with pytest.raises(UserError, match=words):
        OptimizerChoice(learning_rate=1e-3, weight_decay=0.0, **(defaults | options))


def test_what_looks_at_whole_weights_is_refused_where_they_are_in_parts() -> None:
    def choice(name: str) -> OptimizerChoice:
        return OptimizerChoice(name, 1e-3, 0.0, None, {})

    choice("rmsprop").check_sharding()
    with pytest.raises(UserError, match=r"module.optimizer=adafactor: it looks at whole weights"):
        choice("adafactor").check_sharding()
