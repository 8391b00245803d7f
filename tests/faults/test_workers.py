"""Row F26 of the fault list: a DataLoader worker is killed; and what doesn't kill it."""

import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.process.stop_signals import SIGNALS
from tests.callbacks.watched import dpo
from tests.tiny_models import fit, lightning_warnings, make_data

pytestmark = [
    pytest.mark.slow,
    lightning_warnings,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class KillWorker(Callback):
    """To the process that loads training steps: the signals that stop a run, then kill -9."""

    pid: int | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        self.pid = min(process.pid or 0 for process in multiprocessing.active_children())
        sent = {1: SIGNALS, 3: (signal.SIGKILL,)}
        for number in sent.get(trainer.global_step, ()):
            os.kill(self.pid, number)


def train(folder: Path, *callbacks: Callback, resume: bool = False) -> int:
    data = make_data(24, pairs_per_step=2, num_workers=1)
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    trainer = fit(
        dpo(),
        data,
        family="llama",
        dtype="float32",
        limit_val_batches=1.0,
        val_check_interval=2,
        enable_checkpointing=True,
        callbacks=[*callbacks, last],
        ckpt_path=str(folder / "last.ckpt") if resume else None,
    )
    return trainer.global_step


def test_a_killed_worker_is_named_at_once_and_the_run_can_go_on(tmp_path: Path) -> None:
    fault = KillWorker()
    with pytest.raises(RuntimeError) as stopped:
        train(tmp_path, fault)
    assert re.search(rf"DataLoader worker \(pid(\(s\))?:? {fault.pid}\)", str(stopped.value)), stopped.value
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2, (
        "signals to stop, which came before, are the trainer's"
    )
    assert train(tmp_path, resume=True) == 12
