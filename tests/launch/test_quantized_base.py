"""model.quantization=nf4: adapters are trained beside 4-bit weights, and all that comes after reads the numbers these stand for."""

import json
import math
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from peft import PeftModel
from transformers import AutoModelForCausalLM

from analysis.open.models import load_model
from launch.training import train
from tests.analysis.asked import save_model
from tests.cli import composed, logged
from tiltmeter.errors import UserError

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
IDS = torch.arange(3, 40)[None]


def options(tmp_path: Path, *more: str) -> list[str]:
    said = "\n\nHuman: Hi {}\n\nAssistant: {}."
    rows = [json.dumps({"chosen": said.format(i, "yes"), "rejected": said.format(i, "no")}) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return [
        "experiment=pretrained_hh", "trainer=cpu", "logger=csv", f"runs_root={tmp_path / 'runs'}", "model.quantization=nf4",
        f"model.name_or_path={tmp_path / 'base'}", f"data.path={tmp_path / 'rows.jsonl'}", "datamodule.max_length=128",
        "datamodule.val_pairs=0", "datamodule.probe_pairs=8", "datamodule.pairs_per_step=4", *more,
    ]  # fmt: skip


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("whole", [(), ("module.lora.modules_to_save=[lm_head]",)], ids=["adapters", "and lm_head"])
def test_run_on_quantized_weights_is_merged_and_resumed_on_their_numbers(
    whole: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "base", seed=0, **WIDTHS)).state_dict()
    lora = ("adapter=lora", *whole, "callbacks=geometry", "module.learning_rate=1e-2", "module.optimizer=adamw_8bit")
    run = train(composed(*options(tmp_path, *lora, "trainer.max_steps=2")))
    GlobalHydra.instance().clear()
    assert "in nf4, kept in" in " ".join(capsys.readouterr().out.split())
    assert logged(run, "train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)

    # in training mode: in evaluation bitsandbytes computes in bfloat16 on processors that have instructions for it
    quantized = AutoModelForCausalLM.from_pretrained(run / "base").train()
    assert quantized.is_quantized
    start = logits(quantized)
    opened = load_model(run / "base").model
    torch.testing.assert_close(logits(opened), start, rtol=0, atol=1e-5)
    name = "model.layers.0.mlp.up_proj.weight"
    error = (opened.state_dict()[name] - given[name]).norm() / given[name].norm()
    assert 0.07 < error < 0.12  # of normal numbers in blocks of 64, about 0.09
    torch.testing.assert_close(opened.state_dict()["lm_head.weight"], given["lm_head.weight"], rtol=0, atol=0)
    aligned = AutoModelForCausalLM.from_pretrained(run / "aligned")
    assert not getattr(aligned, "is_quantized", False)
    adapted = PeftModel.from_pretrained(quantized, run / "adapter").train()
    torch.testing.assert_close(logits(aligned), logits(adapted), rtol=0, atol=1e-5)
    assert (logits(aligned) - start).abs().max() > 1e-3
    assert (run / "snapshots" / "random_update.json").is_file()

    again = train(
        composed(*options(tmp_path, *lora, "trainer.max_steps=3", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}"))
    )
    GlobalHydra.instance().clear()
    assert again == run
    assert len(logged(run, "train/loss")) == 3


def test_map_whose_rows_are_no_whole_blocks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "base", seed=0, hidden_size=96, intermediate_size=128)
    with pytest.raises(SystemExit):
        train(composed(*options(tmp_path, "callbacks=none", "adapter=lora", "trainer.max_steps=1")))
    assert "layers.0.self_attn.q_proj takes 96 numbers, expected a multiple of 64" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "model.quantization: quantized weights can't be trained; add adapter=lora"),
        (("adapter=lora", "trainer=fsdp"), "model.quantization: quantized weights can't be sharded here"),
        (("adapter=lora", "model.quantization=int3"), "model.quantization: expected nf4, or null for none, got int3"),
    ],
)
def test_quantized_weights_are_refused_where_they_would_be_trained_or_sharded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], words: str
) -> None:
    save_model(tmp_path / "base", seed=0, **WIDTHS)
    with pytest.raises((UserError, SystemExit)):
        train(composed(*options(tmp_path, "callbacks=none", "trainer.max_steps=1", *more)))
    assert words in " ".join(capsys.readouterr().err.split())
