"""docs/from_trl.md names every field of TRL's DPOConfig once, and only options that there are."""

import inspect
import re
from dataclasses import fields

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf

from datamodules.preference import PreferenceDataModule
from lightning_modules.base import LogProbModule
from lightning_modules.dpo import DPOModule
from tests.processes import ROOT
from tiltmeter.models.causal_lm import CausalLM

ROWS = re.findall(r"^\| (`.*?) \|(.*?)\| (.*?) \|$", (ROOT / "docs" / "from_trl.md").read_text("utf-8"), flags=re.M)
NODES = {
    "module": (LogProbModule, DPOModule),
    "datamodule": (PreferenceDataModule,),
    "model": (CausalLM,),
    "trainer": (Trainer,),
    "checkpoint": (ModelCheckpoint,),
    "last_checkpoint": (ModelCheckpoint,),
}


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_field_of_trl_s_config_has_one_row() -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    told = [field for row in ROWS for field in named(row[0])]
    assert sorted(told) == sorted(field.name for field in fields(trl.DPOConfig))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: named(row[0])[0])
def test_a_row_names_options_that_there_are_or_says_why_not(row: tuple[str, str, str]) -> None:
    keys = named(row[1])
    if not keys:
        assert row[2].startswith(("not needed", "not supported", "never"))
    top = OmegaConf.load(ROOT / "conf" / "train.yaml")
    nodes = set(map(str, top))
    groups = {next(iter(each)) for each in top.defaults if not isinstance(each, str)}
    for key in keys:
        node, _, option = key.partition(".")
        if node in NODES:
            assert any(option in inspect.signature(part).parameters for part in NODES[node]), key
        else:
            assert node in nodes | groups, key
