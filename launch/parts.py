"""The parts of a run, built in an order in which wrong input costs nothing."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig, OmegaConf
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from analysis.open.adapters import adapter_to_merge, find_adapter
from analysis.open.runs import ADAPTER_FOLDER, SAE_FILE, finished_runs, read_config, start_of
from datamodules.preference import PreferenceDataModule
from datamodules.tokenization import train_bpe_tokenizer
from launch.configuration import CONF, check_config, expand_home
from launch.loggers.tensorboard import MODE as TENSORBOARD
from launch.loggers.tensorboard import check_tensorboard
from launch.loggers.wandb_logger import Mode
from launch.made_models import without_gguf
from lightning_modules.base import LogProbModule
from lightning_modules.schedule import steps_of_fit
from tiltmeter.commands import command, setting
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import CausalLM, ReferenceModel
from tiltmeter.models.quantization import check_bitsandbytes, is_quantized
from tiltmeter.pairs.chat import as_date

_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true", "32", "64")
_UNUSED: tuple[tuple[str, Any, str], ...] = (
    ("gradient_clip_val gradient_clip_algorithm", None, "gradients are limited by module.gradient_clip_norm"),
    ("accumulate_grad_batches", 1, "steps are set by datamodule.pairs_per_step and datamodule.tokens_per_micro_batch"),
    ("overfit_batches", 0, "datamodule.train_pairs=N trains on few pairs"),
    ("fast_dev_run", False, "trainer.max_steps=2 trainer.limit_val_batches=1 callbacks=none is a short run"),
    ("limit_test_batches limit_predict_batches", None, "a run is neither a test nor a prediction"),
    ("reload_dataloaders_every_n_epochs", 0, "data are read once"),
    ("sync_batchnorm barebones", False, "leave it out"),
    ("model_registry", None, "leave it out"),
)
"""Options of a trainer that would change nothing, or break what a run promises; their defaults; and what to do instead."""
_CHECKPOINTS = {
    "checkpoint": ("monitor", "mode", "save_top_k", "every_n_epochs"),
    "last_checkpoint": ("every_n_train_steps", "every_n_epochs", "save_on_train_epoch_end"),
}
LAST = "last"
"""Value of ``module.sparse.sae`` that stands for the autoencoder of the newest run."""
_OURS = (
    "logger", "callbacks", "default_root_dir", "enable_model_summary", "num_sanity_val_steps", "use_distributed_sampler"
)  # fmt: skip


@dataclass
class Parts:
    """Parts of a run before its trainer exists."""

    data: PreferenceDataModule
    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    module: LogProbModule
    model_revision: str | None
    """Commit of the model on the hub; None for local folders and models from scratch."""


def check_options(config: DictConfig) -> None:
    """Everything that can be said of a configuration without touching data or models. Raises UserError."""
    expand_home(config)
    _name_autoencoder(config)
    check_config(config)
    if not isinstance(config.seed, int) or config.seed < 0:
        raise UserError(f"seed: expected a whole number from 0, got {config.seed}")
    if not re.fullmatch(r"[\w-][\w.-]*", str(config.name)):
        raise UserError(f"name: expected letters, digits, _, - and . only, got {config.name}")
    if Path(config.runs_root).exists() and not Path(config.runs_root).is_dir():
        raise UserError(f"runs_root: {config.runs_root} is a file; expected a folder, existing or not")
    as_date(config.chat_date)
    if config.logger.mode not in (modes := (*get_args(Mode), TENSORBOARD)):
        raise UserError(f"logger.mode: expected {' or '.join(modes)}, got {config.logger.mode}")
    if config.logger.mode == TENSORBOARD:
        check_tensorboard()
    _check_trainer(config.trainer)
    _check_checkpoints(config)
    _check_scorers(config)
    if _is_sweep() and config.trainer.get("devices", 1) not in (1, "1") and "LOCAL_RANK" not in os.environ:
        raise UserError(
            "--multirun with trainer.devices above 1: one process can't start several jobs; sweep with devices=1"
        )


def _name_autoencoder(config: DictConfig) -> None:
    """Put the newest run's autoencoder in the place of ``module.sparse.sae=last``; in a study, that of the same seed in it.

    Raises:
        UserError: there is no such run.
    """
    if OmegaConf.select(config, "module.sparse.sae") != LAST:
        return
    found = [run for run in finished_runs(Path(config.runs_root)) if (run / ADAPTER_FOLDER / SAE_FILE).is_file()]
    if config.study_folder is not None:
        own = [(run, read_config(run / "config.yaml")) for run in found]
        found = [
            run for run, of in own if (of.get("study_folder"), of.get("seed")) == (config.study_folder, config.seed)
        ]
        if not found:
            raise UserError(
                f"module.sparse.sae={LAST}: no sparse autoencoder of seed {config.seed} in the study {config.study_folder}; "
                "its arm sparse_autoencoder trains one, study.arms.sparse_autoencoder"
            )
    if not found:
        raise UserError(
            f"module.sparse.sae={LAST}: no run below {config.runs_root} has trained a sparse autoencoder; first "
            f"{command('train.py', experiment='tiny_sae')}, or give the folder of one"
        )
    config.module.sparse.sae = str(max(found, key=start_of) / ADAPTER_FOLDER)


def _is_sweep() -> bool:
    return HydraConfig.initialized() and bool(HydraConfig.get().mode == RunMode.MULTIRUN)


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
    for keys, default, instead in _UNUSED:
        for key in keys.split():
            if trainer.get(key, default) != default:
                raise UserError(f"trainer.{key}: not used here; {instead}")
    _check_stops(trainer)
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


def _check_stops(trainer: DictConfig) -> None:
    if isinstance(trainer.get("max_time"), int | float):
        raise UserError(f"trainer.max_time: expected days:hours:minutes:seconds (00:01:30:00), got {trainer.max_time}")
    if trainer.get("max_time") is None and any(trainer.get(key) is not None for key in ("min_epochs", "min_steps")):
        raise UserError("trainer.min_epochs, trainer.min_steps: only trainer.max_time ends a run early; leave them out")
    for key in ("val_check_interval", "check_val_every_n_epoch"):
        value = trainer.get(key, 1)
        if isinstance(value, int | float) and value <= 0:
            raise UserError(
                f"trainer.{key}: expected more than 0, got {value}; trainer.limit_val_batches=0 validates never"
            )


def _check_checkpoints(config: DictConfig) -> None:
    """Refuse options of Lightning's checkpoints that would change nothing here, or make some that no run goes on from."""
    shipped = yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))
    for name, takes in _CHECKPOINTS.items():
        given = OmegaConf.to_container(config[name])
        assert isinstance(given, dict)
        for key in (str(key) for key, value in given.items() if value != shipped[name].get(key)):
            if key not in takes:
                raise UserError(f"{name}.{key}: not used here; {name} takes {', '.join(takes)}")
            if not config.trainer.get("enable_checkpointing", True):
                raise UserError(f"{name}.{key}: has no effect with trainer.enable_checkpointing=false")
    if config.checkpoint.get("save_top_k", 1) not in (0, 1):
        raise UserError(
            f"checkpoint.save_top_k: expected 1, the best one, or 0, none, got {config.checkpoint.save_top_k}; the newest ones are "
            "kept besides (last_checkpoint.every_n_train_steps=N: more often)"
        )


def build_parts(config: DictConfig) -> Parts:
    """Options first, then files, then token ids: the cheapest check that can fail comes first."""
    module: LogProbModule = instantiate(config.module)
    model: CausalLM = instantiate(config.model)
    if config.base is None and model.init == "random":
        raise UserError(
            "model.init=random: a model from scratch needs a base trained by SFT first; set base (see conf/experiment)"
        )
    reference = _reference(config, model)
    if model.adapter_path is not None:
        adapter_to_merge(model.adapter_path, base=str(model.name_or_path))
    data: PreferenceDataModule = instantiate(config.datamodule, source=instantiate(config.data))
    data.load()
    with _adapter_explained(model):
        model = without_gguf(model, Path(config.runs_root))
        if model.trains_tokenizer:
            tokenizer: PreTrainedTokenizerBase = train_bpe_tokenizer(data.training_texts(), vocab_size=model.vocab_size)
        else:
            tokenizer = model.load_tokenizer()
        model_config = model.load_config(tokenizer)  # a missing or gated model is known here, before any long work
    _check_quantization(config, model, model_config, module)
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and data.max_length > limit:
        raise UserError(
            f"datamodule.max_length={data.max_length}: this model takes at most {limit} tokens; set it to {limit} or less"
        )
    if reference is not None:
        module.attach_reference(lambda: reference.build(tokenizer), lambda: reference.build_empty(tokenizer))
        reference.check_tokenizer(tokenizer)
        reference.load_config()
    data.tokenize(tokenizer, model.load_end_ids())
    revision = getattr(model_config, "_commit_hash", None) or model.revision
    return Parts(data, model, tokenizer, module, revision)


def _check_quantization(
    config: DictConfig, model: CausalLM, model_config: PretrainedConfig, module: LogProbModule
) -> None:
    """Refuse quantized weights where they would be trained or sharded."""
    quantized_already = is_quantized(model_config, f"model.name_or_path: {model.name_or_path}")
    if not quantized_already and model.quantization is None:
        return
    key = "model.quantization" if model.quantization is not None else "model.name_or_path"
    if module.lora is None:
        raise UserError(
            f"{key}: quantized weights can't be trained; add adapter=lora, which trains adapters beside them"
        )
    if model.quantization is not None and quantized_already:
        raise UserError(f"{key}: {model.name_or_path} is quantized already; leave it out")
    if not isinstance(config.trainer.get("strategy", "auto"), str):
        raise UserError(f"{key}: quantized weights can't be sharded here; use trainer=ddp or trainer=gpu")
    check_bitsandbytes(key)


@contextmanager
def _adapter_explained(model: CausalLM) -> Iterator[None]:
    """Say what can be done with a LoRA adapter in the place of a model."""
    try:
        yield
    except UserError as error:
        if model.name_or_path is None or (folder := find_adapter(model.name_or_path)) is None:
            raise
        compare = command("analyze.py", base="ITS_BASE", aligned=folder)
        raise UserError(
            f"{error}; to go on from it, add {setting('model.adapter_path', folder)}; to compare both: {compare}"
        ) from error


def _reference(config: DictConfig, model: CausalLM) -> ReferenceModel | None:
    given = {str(key) for key, value in config.reference.items() if value is not None} - {"_target_"}
    if not given:
        return None
    if wrong := sorted(given - {"name_or_path", "revision", "dtype", "attn_implementation"}):
        raise UserError(f"reference.{wrong[0]}: not of a reference, which is a model that there is; leave it out")
    reference = ReferenceModel(**{"dtype": model.dtype, **{key: config.reference[key] for key in given}})
    return without_gguf(reference, Path(config.runs_root))


def check_length(trainer: Trainer, data: PreferenceDataModule) -> None:
    """Refuse a run that takes no step, has no end, or asks for validations that hold nothing or that no epoch is long enough for.

    Raises:
        UserError: it is such a run.
    """
    if any(isinstance(callback, Timer) and not callback.time_remaining() for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise UserError("trainer.max_time: expected more than no time, got 0 seconds")
    n_steps = data.steps_within(trainer.limit_train_batches)
    interval = getattr(trainer, "val_check_interval", None)  # none where it is a time
    steps_of_fit(trainer, n_steps)
    n_batches, share = -(-len(data.splits["val"].pairs) // data.pairs_per_step), trainer.limit_val_batches
    if isinstance(share, float) and 0 < share * n_batches < 1:
        raise UserError(
            f"trainer.limit_val_batches={share}: none of {n_batches} batches; set a whole number, or 0 for no validation"
        )
    validates_in_epochs = trainer.limit_val_batches > 0 and trainer.check_val_every_n_epoch is not None
    if isinstance(interval, int) and interval > n_steps and validates_in_epochs:
        raise UserError(
            f"trainer.val_check_interval={interval}: an epoch has only {n_steps} steps; set it to that or less, or "
            "to a share of the epoch such as 0.5"
        )
