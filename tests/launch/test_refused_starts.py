"""A start that is refused, for whatever reason and however late it is known, leaves every byte of the run folder as it was."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from analysis.open.kept_models import read_provenance
from tests.analysis.asked import save_model
from tests.cli import logged, only_run, run_train
from tests.faults.faults import no_room_for
from tests.processes import contents

pytestmark = pytest.mark.slow
RUN = (
    "data.n_prompts=60", "datamodule.val_pairs=8", "datamodule.probe_pairs=4", "datamodule.pairs_per_step=8", "logger=csv",
    "callbacks=none", "trainer.max_steps=4", "last_checkpoint.every_n_train_steps=1", "checkpoint.save_top_k=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def train(root: Path, *options: str, **how: object) -> tuple[int, str, str]:
    ended = run_train(*RUN, f"model.name_or_path={root / 'toy'}", f"runs_root={root}", *options, **how)  # type: ignore[arg-type]
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    """A run, as if killed while it saved and wrote a row."""
    save_model(root / "toy", seed=0)
    code, _, said = train(root)
    assert code == 0, said
    folder = only_run(root)
    (folder / "checkpoints" / ".partial-last.ckpt").write_bytes(b"half")
    with (folder / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("4,0,0.6")
    return folder


def earlier(run: Path) -> str:
    """The checkpoint before the last, from which there is a step to take."""
    (path,) = (run / "checkpoints").glob("last*3.ckpt")
    return f"ckpt_path='{path}'"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("module.learning_rate=1e-5",), "these settings would make it another run: module.learning_rate was"),
        (("seed=3", "allow_config_change=true"), "can't be changed when it goes on"),
        (("data.seed=5", "allow_config_change=true"), "other data or another tokenisation"),
        (("datamodule.probe_pairs=5", "allow_config_change=true"), "other data or another tokenisation"),
        (("trainer.max_steps=2",), "trainer.max_steps=2: .* has taken 3 steps already"),
        (("callbacks=geometry",), "this checkpoint holds no hidden states of the base model"),
        (("callbacks=behaviour",), "this checkpoint holds no completions of the base model"),
        (
            ("judge=local", "judge.judge.model=/nowhere", "callbacks=behaviour"),
            "judge.judge.model: no such folder: /nowhere",
        ),
        (
            ("ckpt_path=last", "module.learning_rate=1e-5", "allow_config_change=true"),
            "none to take under module.learning_rate was",
        ),
        (("trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true"), "is one file, which a sharded run"),
    ],
    ids=[
        "settings",
        "order",
        "data",
        "probe",
        "fewer steps",
        "states",
        "completions",
        "judge",
        "no step left",
        "strategy",
    ],
)
def test_a_refused_resume_changes_nothing(options: tuple[str, ...], reason: str, root: Path, run: Path) -> None:
    before = contents(run)
    code, _, said = train(root, earlier(run), *options)  # the last word on an option counts
    assert code == 2, said
    (line,) = said.strip().splitlines()
    assert re.search(reason, line), line
    assert contents(run) == before


def test_a_base_that_was_changed_is_refused_by_its_file(root: Path, run: Path) -> None:
    weights = run / "base" / "model.safetensors"
    own = weights.read_bytes()
    save_file({k: v + 1 for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    before = contents(run)
    code, _, said = train(root, "ckpt_path=last")
    assert code == 2
    assert f"{weights}: changed since it was written: expected sha256" in said
    assert contents(run) == before
    weights.write_bytes(own)


def test_after_refusals_the_right_resume_goes_on_and_only_then_cleans_up(root: Path, run: Path) -> None:
    save_model(root / "toy", seed=7)  # the next round of training writes where this one started from
    base = load_file(run / "base" / "model.safetensors")
    options = ("module.learning_rate=1e-5", "module.weight_decay=0.5", "trainer.log_every_n_steps=1")
    code, out, said = train(root, earlier(run), "allow_config_change=true", *options)
    assert code == 0, said
    assert not (run / "checkpoints" / ".partial-last.ckpt").exists()
    assert "Removed:" in out
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["module"]["learning_rate"] == 1e-5
    assert len(logged(run, "train/loss")) == 4
    assert logged(run, "train/learning_rate")[-1] <= 1e-5 < logged(run, "train/learning_rate")[-2]
    (change,) = read_provenance(run)["changed_settings"]
    assert change["after_step"] == 3
    assert [line.partition(" ")[0] for line in change["settings"]] == ["module.learning_rate", "module.weight_decay"]
    assert {path.stat().st_nlink for path in run.rglob("*") if path.is_file()} == {1}
    assert all(torch.equal(value, base[name]) for name, value in load_file(run / "base" / "model.safetensors").items())


@pytest.mark.parametrize(
    ("options", "before", "reason"),
    [
        (("callbacks=geometry", "datamodule.probe_pairs=0"), None, "expected held-out pairs to probe"),
        ((), partial(no_room_for, "config.yaml"), "config.yaml: could not be written .*; nothing was started"),
        ((), partial(no_room_for, "base"), "base: could not be written .*; nothing was started"),
    ],
    ids=["probe", "configuration", "base"],
)
def test_a_new_run_that_is_refused_leaves_no_folder(
    options: tuple[str, ...], before: Any, reason: str, root: Path, run: Path
) -> None:
    there = {path.name for path in run.parent.iterdir()}
    code, _, said = train(root, *options, before=before)
    assert code == 2, said
    assert re.search(reason, said), said
    assert {path.name for path in run.parent.iterdir()} == there
