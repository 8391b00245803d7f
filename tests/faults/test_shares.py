"""Rows F23 and F28 of the fault list: every callback on two processes, of which one has nothing to validate or to train on."""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.behaviour.acceptance import Acceptance
from callbacks.process.agreement import Agreement
from callbacks.process.preemption import Preemption
from callbacks.process.progress import TrainingProgress
from callbacks.process.random_state import RandomState
from callbacks.training_alarms import TrainingAlarms
from tests.callbacks.memory_logger import MemoryLogger
from tests.callbacks.watched import dpo
from tests.cli import composed
from tests.processes import ROOT, codes, run_on_ranks
from tests.tiny_models import fit, lightning_warnings, make_data
from tiltmeter.errors import UserError

pytestmark = [pytest.mark.slow, lightning_warnings]
OPTIONS = ("callbacks=full", "judge=none", "decoding.max_new_tokens=6", "decoding.temperature=0.0", "truthfulqa=mc")
QUESTION = {
    "question": "Is tea kind?",
    "mc1_targets": {"blue": 0, "rain": 1},
    "mc2_targets": {"kind": 0, "rain": 1, "tea": 1},
}


def every_callback(folder: Path) -> list[Callback]:
    """Those of ``callbacks=full``, looking every two steps, and those that every run has."""
    questions = folder / "mc_task.json"
    questions.write_text(json.dumps([QUESTION] * 3), encoding="utf-8")
    config = composed(*OPTIONS, f"truthfulqa.path={questions}")
    named = [instantiate(node) for node in config.callbacks.values()]
    alarms = [TrainingAlarms(window=2) if isinstance(callback, TrainingAlarms) else callback for callback in named]
    last = ModelCheckpoint(folder / "checkpoints", filename="last", enable_version_counter=False)
    return [Acceptance(str), *alarms, Preemption(last), Agreement(lambda: {"data": "the same"}), RandomState(), last]


def train(folder: Path, **options: Any) -> None:
    """Twelve pairs in steps of five, so that the last one has two, and one to validate."""
    logger = MemoryLogger()
    folder.mkdir(exist_ok=True)
    data = make_data(26, val_pairs=1, probe_pairs=15, pairs_per_step=5, tokens_per_micro_batch=60)
    fit(dpo(), data, family="llama", dtype="float32", callbacks=every_callback(folder), logger=logger, max_epochs=2,
        limit_val_batches=1.0, enable_checkpointing=True, default_root_dir=folder, log_every_n_steps=1, **options)  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(logger.rows), encoding="utf-8")


def train_as_one_of_two(rank: int, folder: Path) -> None:
    train(folder / str(rank), devices=2, strategy="ddp")
    data = make_data(12, pairs_per_step=4)
    for step in (1, 2):  # two checkpoints, of which each process will take another
        last = ModelCheckpoint(folder / f"at {step}", filename="last", enable_version_counter=False)
        fit(dpo(), data, family="llama", dtype="float32", devices=2, strategy="ddp", max_steps=step,
            limit_val_batches=1.0, val_check_interval=1, enable_checkpointing=True, callbacks=[last])  # fmt: skip
    with pytest.raises(UserError) as differing:
        fit(dpo(), data, family="llama", dtype="float32", devices=2, strategy="ddp", max_steps=3,
            callbacks=[Agreement(dict)], ckpt_path=str(folder / f"at {1 + rank}" / "last.ckpt"))  # fmt: skip
    (folder / f"{rank}.differing").write_text(str(differing.value), encoding="utf-8")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    ended = run_on_ranks(train_as_one_of_two, folder)
    assert codes(ended) == [0, 0], ended
    return folder


def test_every_callback_is_among_them(tmp_path: Path) -> None:
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "callbacks").rglob("[!_]*.py")]
    modules = [importlib.import_module(".".join(file.parts)) for file in files]
    classes = {kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass)}
    ours = {kind for kind in classes if issubclass(kind, Callback) and kind.__module__.startswith("callbacks.")}
    used = {kind for callback in every_callback(tmp_path) for kind in type(callback).__mro__}
    assert ours - used == {TrainingProgress}, "which draws a bar on the first process"


def test_two_processes_say_what_one_says_also_when_one_has_nothing_to_do(two_ranks: Path, tmp_path: Path) -> None:
    train(tmp_path / "alone")
    alone, ours = (json.loads((f / "rows.json").read_text("utf-8")) for f in (tmp_path / "alone", two_ranks / "0"))
    assert len(ours) == len(alone) > 10
    for row, expected in zip(ours, alone, strict=True):
        values = {name: value for name, value in expected.items() if not name.startswith("throughput/")}
        assert row.keys() == expected.keys()
        assert {name: row[name] for name in values} == pytest.approx(values, rel=1e-5, abs=1e-6, nan_ok=True)


def test_processes_that_loaded_different_checkpoints_stop(two_ranks: Path) -> None:
    for rank in range(2):
        line = (two_ranks / f"{rank}.differing").read_text(encoding="utf-8")
        assert line.startswith("steps of the checkpoint: process 0 has 1, process 1 has 2; start all processes with")
