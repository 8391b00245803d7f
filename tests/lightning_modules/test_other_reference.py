"""References that aren't the model in training: another model, and the base of a run that goes on for more steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import PreTrainedModel

from datamodules.preference import PreferenceDataModule
from lightning_modules.dpo import DPOModule
from tests.tiny_models import fit, lightning_warnings, make_data, make_model, make_tokenizer, reference_log_probs

pytestmark = lightning_warnings


def other_model(seed: int) -> PreTrainedModel:
    return make_model("llama", torch.float64, vocab_size=len(make_tokenizer()), seed=seed)


def trained(
    data: PreferenceDataModule, *, cache: Path | None = None, reference: int | None = None, **options: Any
) -> DPOModule:
    module = DPOModule(learning_rate=1e-3, schedule="constant", warmup_share=0.0)
    if reference is not None:
        module.attach_reference(lambda: other_model(reference))
    fit(module, data, family="llama", dtype="float64", reference_cache=cache, **options)
    return module


def direct(data: PreferenceDataModule, model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return reference_log_probs(model, data.splits["train"].pairs).view(2, -1).T


def test_another_model_gives_the_reference_and_is_neither_trained_nor_kept() -> None:
    data = make_data(6, pairs_per_step=6)
    module = trained(data, reference=5)
    assert_close(module.reference["train"], direct(data, other_model(5)), rtol=1e-6, atol=1e-8)
    start = DPOModule(learning_rate=1e-30)
    fit(start, data, family="llama", dtype="float64")
    policy = direct(data, start.trained_policy.model)
    margins = (policy - module.reference["train"]) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    expected = -F.logsigmoid(module.loss.beta * margins).mean()
    assert module.trainer.callback_metrics["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert module.state_dict().keys() == start.state_dict().keys()


def test_each_reference_has_a_cache_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(6, pairs_per_step=6)
    tables = [trained(data, cache=tmp_path, reference=seed).reference["train"] for seed in (5, 6, 5)]
    said = [line for line in capsys.readouterr().out.splitlines() if line.endswith("(train)")]
    assert ["0 pairs found" in line for line in said] == [True, True, False]
    assert torch.equal(tables[0], tables[2])
    assert not torch.allclose(tables[0], tables[1])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("reference", [None, 5])
def test_a_run_that_goes_on_for_more_steps_has_the_reference_of_those_from_its_start(
    reference: int | None, tmp_path: Path
) -> None:
    def steps(n: int, **options: Any) -> DPOModule:
        keep = ModelCheckpoint(tmp_path, f"{n}-{{step}}", every_n_train_steps=2)
        kept = {"callbacks": [keep], "enable_checkpointing": True}
        return trained(make_data(8, pairs_per_step=2), reference=reference, max_steps=n, **kept, **options)

    first = steps(2)
    assert first.reference["train"].isnan().any(1).sum() == 4
    resumed, whole = steps(4, ckpt_path=str(tmp_path / "2-step=2.ckpt")), steps(4)
    assert torch.equal(resumed.reference["train"], whole.reference["train"])
    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
