"""From a composed configuration to a trained run: build the parts in an order in which wrong input costs nothing."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from datamodules.preference import PreferenceDataModule
from datamodules.tokenization import train_bpe_tokenizer
from launch.base_model import find_or_train_base, progress_callbacks
from launch.command import as_user_error, exit_with
from launch.configuration import check_config
from launch.metrics_csv import MetricsCSV
from launch.run_folder import (
    export_model,
    find_checkpoint,
    is_first_process,
    keep_base,
    new_run_dir,
    write_config,
    write_json,
)
from launch.screen import console, data_table, quiet_libraries, result_table
from launch.wandb_logger import open_wandb
from lightning_modules.base import LogProbModule
from tiltmeter.bootstrap import cluster_mean_interval
from tiltmeter.errors import UserError
from tiltmeter.models import CausalLM

N_SHOWN_PROMPTS = 8
_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true", "32", "64")


@dataclass
class Parts:
    """What a run is made of before its trainer exists."""

    data: PreferenceDataModule
    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    module: LogProbModule


def train(config: DictConfig) -> Path:
    """Train one run. Wrong input ends the process with one line and exit code 2; returns the run folder."""
    quiet_libraries()
    created: list[Path] = []
    try:
        return _train(config, created)
    except Exception as error:
        wrong_input = as_user_error(error)
        for folder in created:  # a run that never took a step leaves nothing behind
            if wrong_input is not None and not any(folder.glob("checkpoints/*")):
                shutil.rmtree(folder, ignore_errors=True)
        if wrong_input is None or config.get("debug"):
            raise
        exit_with(wrong_input)
        raise AssertionError("unreachable") from error


def _train(config: DictConfig, created: list[Path]) -> Path:
    _check(config)
    is_first = is_first_process()
    screen = console(enabled=is_first)
    root = Path(config.runs_root)
    checkpoint = find_checkpoint(config.ckpt_path, root, config.name) if config.ckpt_path else None
    parts = _build_parts(config)
    screen.print(data_table(parts.data, parts.data.labels))
    if config.base is not None:
        parts.model, line = find_or_train_base(config, parts.model, parts.tokenizer, parts.data)
        screen.print(line, soft_wrap=True)
    seed_everything(config.seed, verbose=False)
    parts.module.attach_model(lambda: parts.model.build(parts.tokenizer))

    run_dir = checkpoint.parent.parent if checkpoint else new_run_dir(root, config.name)
    config.run_dir = str(run_dir)
    loggers: list[Logger] = []
    if is_first:
        if not run_dir.exists():
            created.append(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_config(run_dir, config)
        loggers, line = _open_loggers(config, run_dir, parts)
        screen.print(line, soft_wrap=True)
    trainer = _make_trainer(config, loggers)
    started = time.perf_counter()
    trainer.fit(
        parts.module, datamodule=parts.data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True
    )
    seconds = time.perf_counter() - started
    run_dir = Path(trainer.strategy.broadcast(str(run_dir)))
    if trainer.is_global_zero:
        keep_base(run_dir, parts.model, parts.tokenizer)
        write_json(run_dir / "probe_prompts.json", _shown_prompts(parts.data))
    export_model(parts.module.trained_policy, parts.tokenizer, run_dir / "aligned", trainer)
    for logger in loggers:
        if hasattr(logger, "experiment") and hasattr(logger.experiment, "finish"):
            logger.experiment.finish()
    screen.print(result_table(_results(parts, trainer, seconds)))
    screen.print(f"Run: {run_dir}\nNext: python analyze.py run={run_dir}", soft_wrap=True)
    return run_dir


def _check(config: DictConfig) -> None:
    check_config(config)
    if not isinstance(config.seed, int):
        raise UserError(f"seed: expected a whole number, got {config.seed}")
    for key, default, instead in (
        ("gradient_clip_val", None, "module.gradient_clip_norm"),
        ("accumulate_grad_batches", 1, "datamodule.pairs_per_step and datamodule.tokens_per_micro_batch"),
    ):
        if config.trainer.get(key, default) != default:
            raise UserError(f"trainer.{key}: not used here, an optimizer step is set by {instead}")
    precision = str(config.trainer.get("precision", "32-true"))
    if precision not in _PRECISIONS:
        raise UserError(f"trainer.precision: expected one of {', '.join(_PRECISIONS[:4])}, got {precision}")
    if config.trainer.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={config.trainer.accelerator}: no GPU was found here; use trainer=cpu")
    is_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if is_sweep and config.trainer.get("devices", 1) not in (1, "1") and "LOCAL_RANK" not in os.environ:
        raise UserError(
            "--multirun with trainer.devices above 1: one process can't start several jobs; sweep with devices=1"
        )


def _build_parts(config: DictConfig) -> Parts:
    """Options first, then files, then token ids: the cheapest check that can fail comes first."""
    module: LogProbModule = instantiate(config.module)
    model: CausalLM = instantiate(config.model)
    if config.base is None and model.init == "random":
        raise UserError(
            "model.init=random: a model from scratch needs a base trained by SFT first; set base (see conf/experiment)"
        )
    data: PreferenceDataModule = instantiate(config.datamodule, source=instantiate(config.data))
    data.load()
    if model.trains_tokenizer:
        tokenizer: PreTrainedTokenizerBase = train_bpe_tokenizer(data.training_texts(), vocab_size=model.vocab_size)
    else:
        tokenizer = model.load_tokenizer()
    limit = getattr(
        model.load_config(tokenizer), "max_position_embeddings", None
    )  # a missing or gated model is known here
    if limit is not None and data.max_length > limit:
        raise UserError(
            f"datamodule.max_length={data.max_length}: this model takes at most {limit} tokens; set it to {limit} or less"
        )
    data.tokenize(tokenizer)
    interval = config.trainer.get("val_check_interval")
    if isinstance(interval, int) and interval > data.steps_per_epoch:
        raise UserError(
            f"trainer.val_check_interval={interval}: an epoch has only {data.steps_per_epoch} steps; set it to that or less, or "
            "to a share of the epoch such as 0.5"
        )
    return Parts(data, model, tokenizer, module)


def _open_loggers(config: DictConfig, run_dir: Path, parts: Parts) -> tuple[list[Logger], str]:
    facts = {**OmegaConf.to_container(config, resolve=True), **provenance(parts)}  # type: ignore[dict-item]
    options = OmegaConf.to_container(config.logger, resolve=True)
    wandb_logger, line = open_wandb(run_dir=run_dir, config=facts, name=run_dir.name, group=config.name, **options)  # type: ignore[arg-type]
    loggers: list[Logger] = [MetricsCSV(run_dir / "metrics.csv")]
    return loggers + ([wandb_logger] if wandb_logger is not None else []), line


def provenance(parts: Parts) -> dict[str, Any]:
    """Code, versions, data and model that a run was made from."""
    packages = ("torch", "lightning", "transformers", "tokenizers", "hydra-core", "wandb", "safetensors")
    return {
        "git_commit": git_commit(),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
        "data_sha256": {name: split.digest() for name, split in parts.data.splits.items()},
        "data_sources": {report.source: report.location for report in parts.data.reports},
        "model_revision": parts.model.revision,
    }


def git_commit() -> str | None:
    """Commit of the code, with ``+changes`` when the tree differs from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _make_trainer(config: DictConfig, loggers: list[Logger]) -> Trainer:
    callbacks: list[Callback] = progress_callbacks(config, config.arm)
    if config.trainer.get("enable_checkpointing", True):
        callbacks.append(instantiate(config.checkpoint))
    callbacks += [instantiate(node) for node in (config.callbacks or {}).values()]
    trainer: Trainer = instantiate(
        config.trainer,
        logger=loggers or False,
        callbacks=callbacks,
        default_root_dir=config.run_dir,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    return trainer


def _shown_prompts(data: PreferenceDataModule) -> list[dict[str, str]]:
    """A few held-out pairs as exact text, for samples that people read."""
    records = (data.records["probe"] or data.records["val"])[:N_SHOWN_PROMPTS]
    return [
        {"pair_id": r.pair_id, "prompt": r.prompt_text, "chosen": r.chosen_text, "rejected": r.rejected_text}
        for r in records
    ]


def _results(parts: Parts, trainer: Trainer, seconds: float) -> list[tuple[str, str]]:
    known = {name: float(value) for name, value in trainer.callback_metrics.items()}
    rows = [("optimizer steps", f"{trainer.global_step} in {seconds:.0f} s")]
    for name in ("train/loss", "val/loss"):
        if name in known:
            rows.append((name, f"{known[name]:.4f}"))
    table, module = parts.module.validation_table, parts.module
    if table is not None and "rewards/accuracies" in module.columns:
        values = table[:, module.columns.index("rewards/accuracies")].tolist()
        interval = cluster_mean_interval(values, parts.data.splits["val"].groups)
        text = f"{interval.value:.3f}  (95 % CI {interval.low:.3f} … {interval.high:.3f}, {len(values)} pairs)"
        rows.append(("held-out preference accuracy", text))
    if module.seconds_trained:
        rows.append(("throughput", f"{module.pairs_trained / module.seconds_trained:.1f} pairs/s in training steps"))
    if torch.cuda.is_available():
        rows.append(("peak GPU memory", f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"))
    return rows
