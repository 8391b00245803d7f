"""The run folder of DESIGN §4: where it is, and what is written into it, each file whole or not at all."""

import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_modules.base import LogProbModule
from tiltmeter.errors import UserError
from tiltmeter.files import write_atomically, write_json, write_text
from tiltmeter.lora import ADAPTER, add_lora, merged_state
from tiltmeter.models import CausalLM


def new_run_dir(root: Path, experiment: str) -> Path:
    """A folder name that doesn't exist yet, root/experiment/date_time; nothing is created here.

    Every process of a run calls this and may get another second; the first one's is used (it is broadcast after start).
    """
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    folder = root / experiment / stamp
    n = 1
    while folder.exists():
        n += 1
        folder = root / experiment / f"{stamp}_{n}"
    return folder


def write_config(run_dir: Path, config: DictConfig) -> None:
    """config.yaml, resolved."""
    text = OmegaConf.to_yaml(config, resolve=True)
    write_text(run_dir / "config.yaml", text)


def export_model(
    module: LogProbModule, tokenizer: PreTrainedTokenizerBase, folder: Path, trainer: Trainer
) -> str | None:
    """Write plain safetensors, configuration and tokenizer; every process must call this, the first one writes.

    A model with LoRA adapters is written twice: merged, as a plain model, and its adapters alone in ``adapter/`` beside it.
    Where they can't be merged, ``adapter/`` is the result, and why is returned.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, reason = module.trained_policy.model, None
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    if trainer.is_global_zero:
        if module.lora is not None:
            _export_adapters(model, state, folder.with_name("adapter"))
            try:
                model = module.build_model()
                add_lora(model, module.lora)
                state = merged_state(model, state)
            except UserError as error:
                reason = str(error)

        def write(temporary: Path) -> None:
            model.save_pretrained(temporary, state_dict=state, safe_serialization=True)
            tokenizer.save_pretrained(temporary)

        if reason is None:
            write_atomically(folder, write)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier end of this run
    trainer.strategy.barrier()
    return reason


def _export_adapters(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    """What peft reads, to be put on ``base/``; it names its base only when that is on the hub."""
    name = model.config._name_or_path
    model.peft_config[ADAPTER].base_model_name_or_path = None if Path(name).is_dir() else name
    write_atomically(folder, lambda temporary: model.save_pretrained(temporary, state_dict=state))


def keep_base(run_dir: Path, model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """``base/``: the starting model itself, or a pointer when it is on the hub."""
    source = Path(str(model.name_or_path))
    if not source.is_dir():
        write_json(run_dir / "base" / "pointer.json", {"name": model.name_or_path, "revision": model.revision})
        return

    def write(temporary: Path) -> None:
        temporary.mkdir()
        for file in source.iterdir():
            if file.is_file() and file.suffix in (".json", ".safetensors", ".txt", ".jinja", ".model"):
                _link_or_copy(file, temporary / file.name)
        tokenizer.save_pretrained(temporary)

    write_atomically(run_dir / "base", write)


def _link_or_copy(source: Path, target: Path) -> None:
    """Weights are large and never rewritten in place, so they are hard-linked where the file system allows."""
    if source.suffix == ".safetensors":
        try:
            os.link(source.resolve(), target)
        except OSError:
            pass
        else:
            return
    shutil.copy2(source, target)


def is_first_process() -> bool:
    """True in the process that prints and writes; known before any process group exists."""
    return (getattr(rank_zero_only, "rank", None) or 0) == 0
