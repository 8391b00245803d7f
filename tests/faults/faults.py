"""Faults that a forked run can be given (``before`` of :func:`tests.cli.run_train`): installed first, each strikes once."""

import os
import signal
from pathlib import Path
from typing import Any

import torch

import tiltmeter.checkpoint_files as checkpoint_files
from lightning_modules.base import LogProbModule


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_inside_step(step: int) -> None:
    """kill -9 between the first micro-batch's backward pass and the update of the step that follows ``step`` steps."""
    backward = LogProbModule.manual_backward

    def dying(self: LogProbModule, *args: Any, **kwargs: Any) -> None:
        backward(self, *args, **kwargs)
        if self.trainer.global_step == step:
            _die()

    LogProbModule.manual_backward = dying  # type: ignore[method-assign]


def kill_before_step(step: int) -> None:
    """kill -9 when ``step`` steps are taken and logged."""
    start = LogProbModule.on_train_batch_start

    def dying(self: LogProbModule, *args: Any) -> None:
        if self.trainer.global_step == step:
            _die()
        start(self, *args)

    LogProbModule.on_train_batch_start = dying  # type: ignore[method-assign]


def kill_while_saving(step: int) -> None:
    """kill -9 when a checkpoint of that step is written but not committed."""
    describe = checkpoint_files._describe

    def dying(data: Path, name: str) -> Any:
        if f"step-{step:06d}" in name:
            _die()
        return describe(data, name)

    checkpoint_files._describe = dying  # type: ignore[assignment]


def full_disk(step: int) -> None:
    """The disk is full while the checkpoints of that step are written, in the middle of the file."""
    save = torch.save

    def failing(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(content, path, *args, **kwargs)
        if isinstance(content, dict) and content.get("global_step") == step:
            os.truncate(path, Path(path).stat().st_size // 2)
            raise OSError(28, "No space left on device", str(path))

    torch.save = failing  # type: ignore[assignment]


def no_room_for(name: str) -> None:
    """The disk is full when a file or folder of this name would be whole."""
    replace = Path.replace

    def failing(self: Path, target: Any) -> Path:
        if Path(target).name == name:
            raise OSError(28, "No space left on device", str(target))
        return replace(self, target)

    Path.replace = failing  # type: ignore[method-assign,assignment]


def broken_wandb(step: int) -> None:
    """W&B refuses every row from ``step`` steps on and can't finish."""
    import wandb

    log = wandb.Run.log

    def refusing(self: wandb.Run, data: dict[str, Any], *args: Any, **options: Any) -> None:
        if data["trainer/global_step"] >= step:
            raise TypeError("broken table")
        log(self, data, *args, **options)

    def not_finishing(self: wandb.Run, *args: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    wandb.Run.log, wandb.Run.finish = refusing, not_finishing  # type: ignore[method-assign]
