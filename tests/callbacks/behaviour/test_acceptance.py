"""When a run counts as accepted: before anything is written, and after everything that may refuse it."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.behaviour.acceptance import Acceptance
from callbacks.schedule import Scheduled
from tests.callbacks.watched import dpo, watch
from tests.tiny_models import lightning_warnings

pytestmark = [
    lightning_warnings,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


class Noted(Scheduled):
    """Says when it looks, and when it could refuse."""

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    def look(self, trainer: Trainer, module: LightningModule) -> None:
        self.said.append(f"look {trainer.global_step}")

    def on_resume(self, trainer: Trainer, module: LightningModule) -> None:
        self.said.append("could refuse")


class Saved(Callback):
    """Saves inside a step, as Lightning's own callbacks do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the three steps of an epoch."""
    folder = tmp_path_factory.mktemp("run")
    watch(folder, [Saved(folder)], module=dpo(schedule="constant"))
    return folder


def events(folder: Path, checkpoint: str | None, max_epochs: int) -> list[str]:
    said: list[str] = []
    accepted = Acceptance(lambda trainer: said.append(f"accepted {trainer.global_step}"))
    module, options = dpo(schedule="constant"), {"max_epochs": max_epochs, "ckpt_path": checkpoint}
    watch(folder, [accepted, Noted(said)], module=module, **options)
    accepted.accept(module.trainer)
    return said


def test_a_new_run_is_accepted_before_anything_looks_at_its_base(tmp_path: Path) -> None:
    assert events(tmp_path, None, 1) == ["accepted 0", "look 0", "look 3"]


@pytest.mark.parametrize("step", [2, 3], ids=["inside an epoch", "behind its last batch"])
def test_a_run_that_goes_on_is_accepted_after_all_could_refuse_and_before_anything_looks(
    step: int, folder: Path
) -> None:
    said = events(folder, str(folder / f"{step}.ckpt"), 2)
    assert said[:2] == ["could refuse", f"accepted {step}"]
    assert said[-1] == "look 6"


def test_a_run_without_a_step_left_is_accepted_when_asked(folder: Path) -> None:
    assert events(folder, str(folder / "3.ckpt"), 1)[-1] == "accepted 3"
