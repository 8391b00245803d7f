"""A run that goes on under changed options takes them from its next step on, whatever its checkpoint was saved under."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_modules.dpo import DPOModule
from tests.tiny_models import fit, lightning_warnings, make_data

pytestmark = lightning_warnings
BEFORE: dict[str, Any] = {"learning_rate": 3e-3, "weight_decay": 0.01, "schedule": "linear", "warmup_share": 0.0}
CHANGED: dict[str, Any] = {
    "learning_rate": 1e-4, "weight_decay": 0.5, "betas": (0.5, 0.6), "warmup_share": 0.9, "schedule": "cosine",
    "gradient_clip_norm": 1e-3, "max_skipped_steps": 7, "spike_sigmas": 2.0, "loss": "ipo", "beta": 0.7, "sft_weight": 0.5,
}  # fmt: skip


def train(path: str | None, options: dict[str, Any], *, max_epochs: int = 2) -> DPOModule:
    module = DPOModule(**(BEFORE | options))
    fit(module, make_data(8, pairs_per_step=4), family="llama", dtype="float64", max_epochs=max_epochs, ckpt_path=path)
    return module


def weights(module: DPOModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def plain(value: Any) -> Any:
    """Numbers and words that an object holds, as far as options go: what it has counted stays out."""
    if isinstance(value, str | int | float | tuple | None):
        return value
    held = {k: v for k, v in vars(value).items() if not k.startswith("_") and not k.startswith("n_")}
    return {k: v for k, v in held.items() if isinstance(v, str | int | float | tuple | None)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After two of four steps."""
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    train(None, {}, max_epochs=1).trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def unchanged(checkpoint: Path) -> dict[str, Tensor]:
    return weights(train(str(checkpoint), {}))


@pytest.mark.parametrize("option", list(CHANGED)[:6])
def test_a_changed_option_moves_weights_as_if_the_checkpoint_had_been_saved_under_it(
    option: str, checkpoint: Path, unchanged: dict[str, Tensor], tmp_path: Path
) -> None:
    changed = {option: CHANGED[option]}
    edited: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    (group,) = edited["optimizer_states"][0]["param_groups"]
    if option == "learning_rate":
        edited["lr_schedulers"][0]["base_lrs"] = [changed[option]]
        group["initial_lr"] = changed[option]
    elif option in group:
        group[option] = changed[option]
    torch.save(edited, tmp_path / "edited.ckpt")
    found = weights(train(str(checkpoint), changed))
    assert_close(found, weights(train(str(tmp_path / "edited.ckpt"), changed)), rtol=0, atol=0)
    assert any(not torch.equal(found[name], unchanged[name]) for name in found)


def test_no_option_comes_from_the_checkpoint(checkpoint: Path) -> None:
    resumed, fresh = train(str(checkpoint), CHANGED), DPOModule(**CHANGED)
    for part in ("guard", "loss", "optimizer"):
        assert plain(getattr(resumed, part)) == plain(getattr(fresh, part))
    assert {
        name: plain(getattr(resumed, name, None)) for name in CHANGED if name not in ("loss", "beta", "sft_weight")
    } == {name: plain(getattr(fresh, name, None)) for name in CHANGED if name not in ("loss", "beta", "sft_weight")}
    optimizer, scheduler = resumed.optimizers(), resumed.lr_schedulers()
    (group,) = optimizer.param_groups  # type: ignore[union-attr]
    assert (group["initial_lr"], group["weight_decay"], tuple(group["betas"])) == (1e-4, 0.5, (0.5, 0.6))
    assert scheduler.base_lrs == [1e-4]  # type: ignore[union-attr]
