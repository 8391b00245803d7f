"""The parts of a run, built in an order in which wrong input costs nothing."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from datamodules.preference import PreferenceDataModule
from datamodules.tokenization import train_bpe_tokenizer
from launch.configuration import check_config
from launch.wandb_logger import Mode
from lightning_modules.base import LogProbModule
from tiltmeter.chat import as_date
from tiltmeter.errors import UserError
from tiltmeter.models import CausalLM

_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true", "32", "64")
_OURS = (
    "logger", "callbacks", "default_root_dir", "enable_model_summary", "num_sanity_val_steps", "use_distributed_sampler"
)  # fmt: skip


@dataclass
class Parts:
    """What a run is made of before its trainer exists."""

    data: PreferenceDataModule
    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    module: LogProbModule
    model_revision: str | None
    """Commit of the model on the hub; None for local folders and models from scratch."""


def check_options(config: DictConfig) -> None:
    """Everything that can be said of a configuration without touching data or models. Raises UserError."""
    check_config(config)
    if not isinstance(config.seed, int) or config.seed < 0:
        raise UserError(f"seed: expected a whole number from 0, got {config.seed}")
    if not re.fullmatch(r"[\w-][\w.-]*", str(config.name)):
        raise UserError(f"name: expected letters, digits, _, - and . only, got {config.name}")
    if Path(config.runs_root).exists() and not Path(config.runs_root).is_dir():
        raise UserError(f"runs_root: {config.runs_root} is a file; expected a folder, existing or not")
    as_date(config.chat_date)
    if config.logger.mode not in get_args(Mode):
        raise UserError(f"logger.mode: expected {' or '.join(get_args(Mode))}, got {config.logger.mode}")
    _check_trainer(config.trainer)
    _check_scorers(config)
    is_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if is_sweep and config.trainer.get("devices", 1) not in (1, "1") and "LOCAL_RANK" not in os.environ:
        raise UserError(
            "--multirun with trainer.devices above 1: one process can't start several jobs; sweep with devices=1"
        )


def _check_scorers(config: DictConfig) -> None:
    """A scorer that was asked for on the command line needs the callback that asks it."""
    asked = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    for group, callback in (("judge", "generation"), ("toxicity", "generation"), ("truthfulqa", "truthfulqa")):
        wanted = any(text.lstrip("+").split("=")[0].split(".")[0] == group for text in asked)
        if wanted and config[group] is not None and callback not in (config.callbacks or {}):
            raise UserError(
                f"{group}: nothing asks it with these callbacks; use callbacks=standard, callbacks=behaviour or callbacks=full"
            )


def _check_trainer(trainer: DictConfig) -> None:
    for key, default, instead in (
        ("gradient_clip_val", None, "module.gradient_clip_norm"),
        ("accumulate_grad_batches", 1, "datamodule.pairs_per_step and datamodule.tokens_per_micro_batch"),
    ):
        if trainer.get(key, default) != default:
            raise UserError(f"trainer.{key}: not used here, an optimizer step is set by {instead}")
    for key in _OURS:
        if key in trainer:
            raise UserError(f"trainer.{key}: this program sets it itself; leave it out")
    strategy = trainer.get("strategy", "auto")
    if isinstance(strategy, str) and strategy not in ("auto", "ddp"):
        raise UserError(f"trainer.strategy: expected auto or ddp (or trainer=fsdp for sharding), got {strategy}")
    precision = str(trainer.get("precision", "32-true"))
    if precision not in _PRECISIONS:
        raise UserError(f"trainer.precision: expected one of {', '.join(_PRECISIONS[:4])}, got {precision}")
    if trainer.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={trainer.accelerator}: no GPU was found here; use trainer=cpu")


def build_parts(config: DictConfig) -> Parts:
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
    model_config = model.load_config(tokenizer)  # a missing or gated model is known here, before any long work
    limit = getattr(model_config, "max_position_embeddings", None)
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
    revision = getattr(model_config, "_commit_hash", None) or model.revision
    return Parts(data, model, tokenizer, module, revision)
