"""The parts of a run, built in an order in which wrong input costs nothing."""

import os
from dataclasses import dataclass

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from datamodules.preference import PreferenceDataModule
from datamodules.tokenization import train_bpe_tokenizer
from launch.configuration import check_config
from lightning_modules.base import LogProbModule
from tiltmeter.errors import UserError
from tiltmeter.models import CausalLM

_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true", "32", "64")


@dataclass
class Parts:
    """What a run is made of before its trainer exists."""

    data: PreferenceDataModule
    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    module: LogProbModule


def check_options(config: DictConfig) -> None:
    """Everything that can be said of a configuration without touching a file. Raises UserError."""
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
    return Parts(data, model, tokenizer, module)
