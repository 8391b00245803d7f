"""One side of watching.py: a whole training run of conf/experiment/tiny_hh.yaml as ``train.py`` makes it, watched or not.

What comes before the first step (data, model, reference log-probs) is the untimed first turn; the timed ones begin with
the callbacks' look at the base model and end when ``Trainer.fit`` returns.
"""

import contextlib
import csv
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf

from benchmarks.common import Message, peak_memory_mb, synchronizer
from benchmarks.side_tiltmeter import TakeTurns, quiet
from benchmarks.worker import Channel, Turns
from benchmarks.workload import default_data
from callbacks import gradient_geometry
from launch.configuration import CONF
from launch.loggers.metrics_csv import MetricsCSV
from launch.parts import Parts, build_parts
from launch.training import make_trainer, watching_callbacks
from lightning_modules.dpo import DPOModule
from tiltmeter.states.probe_set import Probe

HOOKS = ("on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_save_checkpoint")
PROBE, GRADIENTS = "forward passes over the probe", "gradients, inside backward passes"


@dataclass(frozen=True)
class RunSettings:
    """What a worker is told; travels as JSON."""

    folder: str
    """Where the model and its tokenizer are, and the cache of reference log-probs."""
    callbacks: str
    """Choice in conf/callbacks."""
    run: str
    """Name of the run's own folder in there."""
    data: str | None
    """HH file or folder; None: the stand-in."""
    turns: tuple[int, ...]
    """Optimizer steps of each turn; the first holds none, the second counts the run's start as one more."""
    sizes: tuple[int, int, int] | None = None
    """Pairs to train, to validate on and to probe; None: those of the experiment."""

    def as_json(self) -> dict[str, Any]:
        """For the command line of a worker."""
        return asdict(self)


def turn_lengths(n_steps: int, n_turns: int) -> tuple[int, ...]:
    """Cut a run into turns of about equal length, behind the untimed one.

    >>> turn_lengths(7, 3)
    (0, 4, 2, 2)
    """
    cuts = [round(i * n_steps / n_turns) for i in range(n_turns + 1)]
    first, *rest = (b - a for a, b in itertools.pairwise(cuts))
    return (0, first + 1, *rest)


def composed(settings: RunSettings) -> DictConfig:
    """The experiment's configuration, with a model from scratch."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["experiment=tiny_hh", f"callbacks={settings.callbacks}", "logger=csv"]
        config = compose("train", overrides=overrides)
    OmegaConf.set_struct(config, False)
    config.run_dir = str(Path(settings.folder) / settings.run)
    config.trainer.enable_progress_bar = False
    if settings.sizes is not None:
        for name, size in zip(("train_pairs", "val_pairs", "probe_pairs"), settings.sizes, strict=True):
            config.datamodule[name] = size
    if settings.data is None:
        config.data = {"_target_": "benchmarks.workload.HHLengths", "n_pairs": 1850}
    else:
        config.data.path = settings.data
    return config


def prepare(folder: Path, data: str | None, sizes: tuple[int, int, int] | None) -> tuple[str | None, Parts]:
    """Write random weights of the experiment's model and its tokenizer; returns the data's path and the run's parts.

    No base is trained: whether weights are any good changes neither time nor memory.
    """
    path = data or (str(found) if (found := default_data()) else None)
    parts = build_parts(composed(RunSettings(str(folder), "none", "unused", path, (), sizes)))
    seed_everything(0, verbose=False)
    parts.model.build(parts.tokenizer).save_pretrained(folder / "model")
    parts.tokenizer.save_pretrained(folder / "model")
    return path, parts


class Stopwatch:
    """Seconds under each label, without those of what is timed inside."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def running(self, label: str) -> Iterator[None]:
        """Time a block."""
        self._settle()
        self._open.append(label)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        """The function with a clock around every call."""

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.running(label):
                return function(*arguments, **options)

        return timed

    def _settle(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def time_callbacks(callbacks: Sequence[Callback]) -> Stopwatch:
    """Put clocks on this project's callbacks, on the probe that several share, and on the gradients' hook."""
    clock = Stopwatch()
    for callback in callbacks:
        if type(callback).__module__.startswith("callbacks."):
            for hook in HOOKS:
                setattr(callback, hook, clock.timed(getattr(callback, hook), type(callback).__name__))
    Probe.read = clock.timed(Probe.read, PROBE)  # type: ignore[method-assign]
    shared: Any = gradient_geometry
    capture = shared.capture_gradients
    shared.capture_gradients = lambda model, receive: capture(model, clock.timed(receive, GRADIENTS))
    return clock


class TakeTurnsFromTheStart(TakeTurns):
    """Begins the first timed turn before any other callback's ``on_train_start``, which counts as a step."""

    peak_at_start_mb = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.peak_at_start_mb = peak_memory_mb("cpu")
        self.turns.before_step()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """The run goes on until ``fit`` returns."""


def work(settings: Message, channel: Channel) -> Message:
    """Train once, a turn at a time."""
    quiet()
    settled = RunSettings(**settings)
    config = composed(settled)
    config.model = {
        "_target_": "tiltmeter.models.causal_lm.CausalLM",
        "name_or_path": str(Path(settled.folder) / "model"),
    }
    config.base = None
    parts = build_parts(config)
    assert isinstance(parts.module, DPOModule)
    seed_everything(config.seed, verbose=False)
    parts.module.attach_model(
        lambda: parts.model.build(parts.tokenizer), reference_cache=Path(settled.folder) / "reference"
    )
    metrics = Path(config.run_dir) / "metrics.csv"
    metrics.parent.mkdir()
    trainer = make_trainer(config, watching_callbacks(config), [MetricsCSV(metrics)])
    clock = time_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
    turns = Turns(settled.turns, channel, synchronizer("cpu"))
    taking = TakeTurnsFromTheStart(turns)
    trainer.callbacks.insert(0, taking)  # type: ignore[attr-defined]
    with contextlib.redirect_stdout(sys.stderr):
        trainer.fit(parts.module, datamodule=parts.data)
    turns.end()
    with metrics.open(newline="", encoding="utf-8") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    return {
        "peak_mb": peak_memory_mb("cpu"),
        "peak_at_start_mb": taking.peak_at_start_mb,
        "losses": losses,
        "callbacks": dict(clock.seconds),
        "n_parameters": sum(p.numel() for p in parts.module.trained_policy.model.parameters()),
        "threads": torch.get_num_threads(),
    }
