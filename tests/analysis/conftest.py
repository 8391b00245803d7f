"""Fake run folders, written file by file as training would."""

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.report import style

STAMP = "2026-01-31_12-00-00"
N_STEPS = 10
MakeRun = Callable[..., Path]

CONFIG: dict[str, Any] = {
    "name": "fake",
    "arm": "dpo",
    "seed": 7,
    "model": {"_target_": "tiltmeter.models.causal_lm.CausalLM", "name_or_path": "someone/model"},
    "data": {"_target_": "datamodules.synthetic.SyntheticWorld", "n_prompts": 50, "label_noise": 0.1},
    "module": {"_target_": "lightning_modules.dpo.DPOModule", "learning_rate": 0.0005},
}


@pytest.fixture(scope="session", autouse=True)
def outlines_for_fonts() -> Iterator[None]:
    """Letters as outlines in a PDF: to embed the fonts that a journal asks for takes half of the time of a whole report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(style.STYLE, "pdf.fonttype", 3)
        yield


def dpo_rows() -> list[dict[str, float]]:
    """Ten training steps, validation after the fifth and the tenth: held-out accuracy 0.7, then 0.9."""
    rows: list[dict[str, float]] = []
    for step in range(N_STEPS):
        figures = {"loss": 0.693 - 0.03 * step, "rewards/accuracies": 0.5 + 0.04 * step}
        figures |= {"rewards/chosen": -0.1 * step, "rewards/rejected": -0.3 * step}
        rows.append({"step": step, "epoch": 0} | {f"train/{name}": value for name, value in figures.items()})
        if step in (4, 9):
            held_out = {"loss": 0.6 - 0.02 * step, "rewards/accuracies": 0.7 + 0.04 * (step - 4)}
            held_out |= {"rewards/chosen": -0.2 * step, "rewards/rejected": -0.4 * step}
            rows.append({"step": step, "epoch": 0} | {f"val/{name}": value for name, value in held_out.items()})
    return rows


def sft_rows() -> list[dict[str, float]]:
    """What an SFT run logs."""
    rows = [{"step": i, "epoch": 0, "train/loss": 3.0 - 0.1 * i, "train/logps/chosen": -40.0} for i in range(N_STEPS)]
    validations = {4: 2.2, 9: 2.0}
    return rows + [{"step": i, "epoch": 0, "val/loss": x, "val/logps/chosen": -30.0} for i, x in validations.items()]


def write_run(
    root: Path,
    experiment: str = "fake",
    stamp: str = STAMP,
    *,
    finished: bool = True,
    config: dict[str, Any] | None = None,
    rows: list[dict[str, float]] | None = None,
    prompts: list[dict[str, Any]] | None = None,
) -> Path:
    """A run folder below ``root/runs``."""
    folder = root / "runs" / experiment / stamp
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | (config or {})), encoding="utf-8")
    rows = dpo_rows() if rows is None else rows
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if finished:
        (folder / "aligned").mkdir()
        (folder / "aligned" / "config.json").write_text("{}", encoding="utf-8")
    if prompts is not None:
        (folder / "probe_prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run folder below ``tmp_path/runs``."""
    return partial(write_run, tmp_path)
