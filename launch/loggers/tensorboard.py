"""TensorBoard, instead of Weights & Biases: the same scalars under the same names, in the run folder."""

import shlex
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

from tiltmeter.errors import UserError

MODE = "tensorboard"
"""Value of ``logger.mode``, and the folder inside a run's."""


def check_tensorboard() -> None:
    """Refuse to start without the package.

    Raises:
        UserError: it isn't installed.
    """
    if find_spec(MODE) is None:
        raise UserError(
            "logger=tensorboard: the package isn't here; pip install tensorboard, or take logger=csv (metrics.csv has the same)"
        )


def open_tensorboard(run_dir: Path, *, resume_step: int | None) -> tuple[TensorBoardLogger, str]:
    """A logger into the run folder, and one line that says how to look at it.

    Args:
        resume_step: optimizer steps taken when the run goes on: what was logged of later ones is hidden; None: a new run.
    """
    logger = TensorBoardLogger(run_dir, name="", version=MODE, purge_step=resume_step)
    return logger, f"TensorBoard: look at it with: tensorboard --logdir {shlex.quote(str(run_dir / MODE))}"
