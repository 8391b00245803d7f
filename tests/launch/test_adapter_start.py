"""model.adapter_path: training starts from a base with an adapter merged, which is the reference, or says why it can't."""

import json
import math
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from peft import PeftModel
from transformers import AutoModelForCausalLM

from analysis.open.adapters import adapter_to_merge
from launch.training import train
from tests.analysis.asked import save_model
from tests.analysis.open.test_adapters import write_adapter
from tests.cli import composed, logged
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import CausalLM

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base", seed=0)


@pytest.mark.parametrize("is_whole", [False, True], ids=["adapters", "and modules trained whole, untied"])
def test_a_run_starts_from_the_merged_model_which_is_its_reference(
    is_whole: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "base", seed=0, tie_word_embeddings=is_whole)
    adapter = write_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"] if is_whole else None)
    said = "\n\nHuman: Hi {}\n\nAssistant: {}."
    rows = [json.dumps({"chosen": said.format(i, "yes"), "rejected": said.format(i, "no")}) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    options = ("experiment=pretrained_hh", "trainer=cpu", "callbacks=none", "logger=csv", "trainer.max_steps=1")
    sizes = ("datamodule.val_pairs=0", "datamodule.probe_pairs=8", "datamodule.pairs_per_step=4")
    places = (f"model.name_or_path={base}", f"model.adapter_path={adapter}", f"data.path={tmp_path / 'rows.jsonl'}")
    for when in ("kept", "found"):
        run = train(composed(*options, *sizes, *places, "datamodule.max_length=128", f"runs_root={tmp_path / 'runs'}"))
        GlobalHydra.instance().clear()
        assert f"merged, {when} in" in " ".join(capsys.readouterr().out.split())
    start = AutoModelForCausalLM.from_pretrained(run / "base")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.no_grad():
        torch.testing.assert_close(start(IDS).logits, adapted(IDS).logits, rtol=0, atol=1e-5)
        assert (start(IDS).logits - AutoModelForCausalLM.from_pretrained(base)(IDS).logits).abs().max() > 1e-2
    assert logged(run, "train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert (run / "aligned" / "model.safetensors").is_file()


def test_an_adapter_that_training_cannot_start_from_is_one_line(base: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", seed=0)
    adapter = write_adapter(tmp_path / "adapter", base)
    for where, model, words in (
        (tmp_path / "nowhere", base, "no LoRA adapter at .*nowhere"),
        (adapter, other, "an adapter of .*base, not of .*other"),
    ):
        with pytest.raises(UserError, match=f"^model.adapter_path: .*{words}"):
            adapter_to_merge(str(where), base=str(model))
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"an adapter without adapter_model\.safetensors"):
        adapter_to_merge(str(adapter), base=str(base))
    with pytest.raises(UserError, match=r"^adapter_path: not with init=random"):
        CausalLM(init="random", architecture={"model_type": "llama"}, adapter_path=str(adapter))
