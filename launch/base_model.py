"""Bases made here: a small model trained from scratch by SFT, found again by content instead of retrained."""

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from callbacks.preemption import Preemption
from callbacks.progress import TrainingProgress
from datamodules.preference import PreferenceDataModule
from launch.agreement import agreement
from launch.metrics_csv import MetricsCSV
from launch.run_folder import export_model, on_first_process
from lightning_modules.sft import SFTModule
from tiltmeter.files import write_atomically, write_json
from tiltmeter.models import CausalLM

_FORMAT = 1
"""Part of the key; raise it when the same settings would give another base."""


def base_folder(
    config: DictConfig, model: CausalLM, tokenizer: PreTrainedTokenizerBase, data: PreferenceDataModule
) -> Path:
    """Where the base of these settings is kept: the name is a hash of everything that it depends on."""
    depends_on = {
        "format": _FORMAT,
        "architecture": model.load_config(tokenizer).to_dict(),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "settings": OmegaConf.to_container(config.base, resolve=True),
        "data": data.digest("train"),
        "steps": [data.pairs_per_step, data.tokens_per_micro_batch, str(data.packed), data.bucket_steps],
        "precision": [model.dtype, str(config.trainer.get("precision", "32-true"))],
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
    limits = {name: settings.pop(name) for name in ("max_epochs", "max_steps") if name in settings}
    seed_everything(seed, verbose=False)
    module = SFTModule(**settings)
    module.attach_model(lambda: model.build(tokenizer))
    log = folder.with_name(
        f".{folder.name}.{uuid.uuid4().hex[:12]}.metrics.csv"
    )  # another run may be making this base now
    log.parent.mkdir(parents=True, exist_ok=True)
    trainer: Trainer = instantiate(
        {**config.trainer, "max_steps": -1, "val_check_interval": 1.0, **limits},
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
    export_model(module, tokenizer, folder, trainer, keep_existing=True)

    def say_where_from() -> None:
        write_json(folder / "made_from.json", {"base": OmegaConf.to_container(config.base, resolve=True)})
        if log.exists():
            write_atomically(folder / "metrics.csv", lambda path: log.replace(path))

    on_first_process(say_where_from, trainer)


def progress_callbacks(config: DictConfig, title: str) -> list[Callback]:
    """The progress bar, unless ``trainer.enable_progress_bar=false``."""
    return [TrainingProgress(title)] if config.trainer.get("enable_progress_bar", True) else []
