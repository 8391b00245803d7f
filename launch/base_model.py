"""Bases made here, found again by content: a small model trained from scratch by SFT, or one with an adapter merged into it."""

import hashlib
import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerBase

from analysis.open.adapters import CONFIG, WEIGHTS, adapter_to_merge, merge_adapter
from analysis.open.kept_models import check_made, record_made
from callbacks.process.preemption import Preemption
from callbacks.process.progress import TrainingProgress
from datamodules.preference import PreferenceDataModule
from launch.loggers.metrics_csv import MetricsCSV
from launch.made_models import folder_of, made_from, made_once
from launch.processes.agreement import agreement
from launch.run_folder import export_model, is_first_process, on_first_process
from lightning_modules.sft import SFTModule
from tiltmeter.errors import UserError
from tiltmeter.files import sha256_of, write_atomically
from tiltmeter.models.causal_lm import CausalLM

_FORMAT = 1
"""Part of the key; raise it when the same settings would give another base."""
_LIMITS = ("max_epochs", "max_steps")
_NOT_LEARNED_FROM = (
    "_target_", "accelerator", "devices", "num_nodes", "strategy", "precision", "log_every_n_steps", "enable_progress_bar",
    "enable_checkpointing", "val_check_interval", "check_val_every_n_epoch", "limit_val_batches", "max_time", "min_epochs",
    "min_steps",
)  # fmt: skip
"""Options of a trainer that don't change what a base learns, or are in its key by another name."""


def base_folder(
    config: DictConfig, model: CausalLM, tokenizer: PreTrainedTokenizerBase, data: PreferenceDataModule
) -> Path:
    """Folder of the base of these settings: its name is a hash of everything that it depends on."""
    depends_on = {
        "format": _FORMAT,
        "architecture": model.load_config(tokenizer).to_dict(),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "settings": OmegaConf.to_container(config.base, resolve=True),
        "data": data.digest("train"),
        "steps": [data.pairs_per_step, data.tokens_per_micro_batch, str(data.packed), data.bucket_steps],
        "precision": [model.dtype, str(config.trainer.get("precision", "32-true"))],
        "trainer": {key: value for key, value in _trainer_options(config).items() if key not in _NOT_LEARNED_FROM},
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()
    return Path(config.runs_root) / "cache" / "bases" / digest[:16]


def find_or_train_base(
    config: DictConfig, model: CausalLM, tokenizer: PreTrainedTokenizerBase, data: PreferenceDataModule
) -> tuple[CausalLM, str]:
    """The base as a pretrained model, and one line on where it came from."""
    given_labels, data.labels = data.labels, "given"  # a control changes what DPO sees, never the base it starts from
    folder = base_folder(config, model, tokenizer, data)
    found = (folder / "config.json").is_file()
    if found and is_first_process():
        check_made(folder)
    if not found:
        _train_base(config, model, tokenizer, data, folder)
    data.labels = given_labels
    base = CausalLM(str(folder), dtype=model.dtype, attn_implementation=model.attn_implementation)
    return base, f"Base: {'found' if found else 'trained by SFT, kept'} in {folder}"


def _train_base(
    config: DictConfig, model: CausalLM, tokenizer: PreTrainedTokenizerBase, data: PreferenceDataModule, folder: Path
) -> None:
    settings: dict[str, Any] = dict(OmegaConf.to_container(config.base, resolve=True))  # type: ignore[arg-type]
    seed = settings.pop("seed")
    seed_everything(seed, verbose=False)
    module = SFTModule(**{name: value for name, value in settings.items() if name not in _LIMITS})
    module.attach_model(lambda: model.build(tokenizer))
    log = folder.with_name(
        f".{folder.name}.{uuid.uuid4().hex[:12]}.metrics.csv"
    )  # another run may be making this base now
    log.parent.mkdir(parents=True, exist_ok=True)
    trainer: Trainer = instantiate(
        _trainer_options(config),
        logger=MetricsCSV(log),
        callbacks=[
            *progress_callbacks(config, "base (SFT)"),
            Preemption(None),
            agreement(config, data, trains="its base"),
        ],
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    run_seed, data.seed = data.seed, seed
    trainer.fit(module, datamodule=data)
    data.seed = run_seed

    def record(whole: Path, name: str) -> None:
        record_made(whole, name, base=OmegaConf.to_container(config.base, resolve=True))

    def keep_log() -> None:
        if log.exists():
            write_atomically(folder / "metrics.csv", lambda path: log.replace(path))

    export_model(module, tokenizer, folder, trainer, record=record, keep_existing=True)
    on_first_process(keep_log, trainer)


def merge_adapter_into_base(model: CausalLM, tokenizer: PreTrainedTokenizerBase, root: Path) -> tuple[CausalLM, str]:
    """The base with its adapter merged, in its own dtype, as a pretrained model; and one line on where it is kept.

    It is the start of training and, if no other is named, the reference.

    Args:
        root: folder of all runs, whose cache keeps it.

    Raises:
        UserError: the adapter doesn't fit its base, or can't be merged into it.
    """
    adapter, options = adapter_to_merge(str(model.adapter_path), base=str(model.name_or_path))
    facts = made_from(model, tokenizer, adapter={name: sha256_of(adapter / name) for name in (CONFIG, WEIGHTS)})
    folder = folder_of(root, "merged", facts)

    def make(partial: Path) -> None:
        unquantized = replace(model, adapter_path=None, quantization=None)
        whole = merge_adapter(unquantized.build(tokenizer), options, adapter)
        if any(isinstance(module, LoraLayer) for module in whole.modules()):
            raise UserError(
                f"model.adapter_path: {adapter} can't be merged into {type(whole).__name__}; train with adapter=lora"
            )
        whole.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    found = made_once(folder, make, title="", **facts)
    start = replace(model, name_or_path=str(folder), revision=None, tokenizer=None, adapter_path=None)
    return (
        start,
        f"Base: {model.name_or_path} with {model.adapter_path} merged, {'found' if found else 'kept'} in {folder}",
    )


def _trainer_options(config: DictConfig) -> dict[str, Any]:
    """The run's, with the base's own limits."""
    limits = {name: config.base[name] for name in _LIMITS if name in config.base}
    options: Any = OmegaConf.to_container(config.trainer, resolve=True)
    return {**options, "max_steps": -1, "max_time": None, "val_check_interval": 1.0, **limits}


def progress_callbacks(config: DictConfig, title: str) -> list[Callback]:
    """The progress bar, unless ``trainer.enable_progress_bar=false``."""
    return [TrainingProgress(title)] if config.trainer.get("enable_progress_bar", True) else []
