"""A signal in any step ends the run behind that step, and the resumed run is the one that was never stopped."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.process.preemption import Preemption
from callbacks.process.stop_signals import SIGNALS
from callbacks.spectral_entropy import SpectralEntropy
from tests.callbacks.memory_logger import MemoryLogger
from tests.callbacks.watched import dpo, probe_data, watch
from tests.faults.faulty import SignalInStep
from tests.tiny_models import lightning_warnings
from tiltmeter.errors import Preempted

pytestmark = [
    lightning_warnings,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def run(folder: Path, logger: MemoryLogger, *extra: Callback, resume: bool = False) -> dict[str, torch.Tensor]:
    """Train two epochs of three steps, validated every two, or go on; returns the weights."""
    last = ModelCheckpoint(folder / "checkpoints", filename="last", enable_version_counter=False)
    looks = SpectralEntropy(every_n_steps=2)
    _, module, _ = watch(
        folder,
        [*extra, Preemption(last), looks, last],
        module=dpo(schedule="cosine"),
        data=probe_data(tokens_per_micro_batch=90),
        logger=logger,
        max_epochs=2,
        val_check_interval=2,
        limit_val_batches=1.0,
        enable_checkpointing=True,
        ckpt_path=str(folder / "checkpoints" / "last.ckpt") if resume else None,
    )
    return module.trained_policy.model.state_dict()


def said(logger: MemoryLogger) -> list[dict[str, Any]]:
    """What was logged, without clocks."""
    return [{k: v for k, v in row.items() if not k.startswith("throughput/")} for row in logger.rows]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryLogger, dict[str, torch.Tensor]]:
    logger = MemoryLogger()
    return logger, run(tmp_path_factory.mktemp("golden"), logger)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "name"), [(1, "SIGINT"), (2, "SIGUSR1"), (4, "SIGTERM")])
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(
    golden: tuple[MemoryLogger, dict[str, torch.Tensor]], step: int, name: str, tmp_path: Path
) -> None:
    logger, handlers = MemoryLogger(), [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(Preempted) as stopped:
        run(tmp_path, logger, SignalInStep(step=step, name=name))
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert str(stopped.value) == f"stopped by {name} after step {step + 1}; go on with ckpt_path={last}"
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == step + 1
    assert set(saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"].values()) == {step + 1}
    weights = run(tmp_path, logger, resume=True)
    assert said(logger) == said(golden[0])
    assert weights.keys() == golden[1].keys()
    assert all(torch.equal(weights[name], golden[1][name]) for name in weights)


def test_a_run_that_has_not_taken_a_step_stops_at_once_and_keeps_nothing(tmp_path: Path) -> None:
    class SignalInSetup(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)

    class SignalAtFirstLook(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)

    for when in (SignalInSetup, SignalAtFirstLook):
        with pytest.raises(Preempted, match="stopped by SIGUSR1 after step 0; nothing new to keep"):
            run(tmp_path, MemoryLogger(), when())
        assert not (tmp_path / "checkpoints").exists()


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path: Path) -> None:
    logger = MemoryLogger()
    run(tmp_path, logger, SignalInStep(step=5))
    assert len(logger.of("train/loss")) == 6
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
