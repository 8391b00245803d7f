"""Every precision that the command line accepts takes steps, starts at ln 2 and keeps float32 sums."""

import math

import pytest
import torch

from lightning_modules.dpo import DPOModule
from tests.tiny_models import fit, lightning_warnings, make_data

pytestmark = lightning_warnings


def module() -> DPOModule:
    return DPOModule(learning_rate=1e-3, warmup_share=0.0)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("32-true", 1e-7), ("64-true", 1e-7), ("bf16-mixed", 1e-7), ("bf16-true", 1e-7)]
)
def test_training_steps_run_and_the_first_loss_is_ln_2(precision: str, tolerance: float) -> None:
    dpo = module()
    first: list[float] = []
    step = dpo.training_step

    def watched(batch: object, batch_idx: int) -> None:
        step(batch, batch_idx)  # type: ignore[arg-type]
        first.append(float(dpo.trainer.callback_metrics["train/loss"]))

    dpo.training_step = watched  # type: ignore[method-assign]
    trainer = fit(dpo, make_data(8, pairs_per_step=4), family="llama", dtype="float32", precision=precision)
    assert trainer.global_step == 2
    assert first[0] == pytest.approx(math.log(2), abs=tolerance)
    expected = {"64-true": torch.float64}.get(precision, torch.float32)
    assert dpo.reference["train"].dtype == expected
    assert all(parameter.isfinite().all() for parameter in dpo.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_steps_run_on_a_gpu(precision: str) -> None:
    dpo = module()
    trainer = fit(
        dpo, make_data(8, pairs_per_step=4), family="llama", dtype="float32", precision=precision, accelerator="gpu"
    )
    assert trainer.global_step == 2
    assert next(dpo.parameters()).is_cuda
