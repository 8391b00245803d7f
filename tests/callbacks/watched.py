"""Tiny runs with callbacks: nine prompts to look at, three steps an epoch, a logger that keeps everything."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback

from datamodules.preference import PreferenceDataModule
from lightning_modules.base import LogProbModule
from lightning_modules.dpo import DPOModule
from tests.callbacks.memory_logger import MemoryLogger
from tests.tiny_models import fit, make_data

N_PROBE = 9


class Watched(NamedTuple):
    """What is left of a run."""

    logger: MemoryLogger
    module: LogProbModule
    data: PreferenceDataModule


def probe_data(**options: Any) -> PreferenceDataModule:
    return make_data(12 + N_PROBE, **({"pairs_per_step": 4, "probe_pairs": N_PROBE} | options))


def dpo(**options: Any) -> DPOModule:
    return DPOModule(**({"learning_rate": 3e-3, "warmup_share": 0.0} | options))


def watch(
    folder: Path,
    callbacks: Sequence[Callback],
    *,
    module: LogProbModule | None = None,
    data: PreferenceDataModule | None = None,
    **options: Any,
) -> Watched:
    """Train one epoch."""
    logger, module, data = MemoryLogger(), module or dpo(), data or probe_data()
    options = {
        "callbacks": list(callbacks),
        "logger": logger,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
    } | options
    fit(module, data, **({"family": "llama", "dtype": "float32"} | options))
    return Watched(logger, module, data)
