"""The run folder of DESIGN §4: where it is, and what is written into it, each file whole or not at all."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from analysis.open.kept_models import check_kept, record_kept
from analysis.open.runs import ADAPTER_FOLDER, VECTOR_FILE, source_of_base
from lightning_modules.base import LogProbModule
from tiltmeter.errors import FailedWrite, UserError
from tiltmeter.files import copy_file, write_atomically, write_json, write_text
from tiltmeter.models.causal_lm import CausalLM
from tiltmeter.models.lora import ADAPTER
from tiltmeter.models.trained_vector import TrainedVector, trained_vector
from tiltmeter.steering.vector import TRAINED, SteeringVector, VectorId, save_vectors

BASE = "base"
T = TypeVar("T")


def claim_folder(parent: Path) -> Path:
    """Make a folder that is named after the time, and nobody else's: ``2026-01-31_12-00-00``, or with ``_2``, ``_3`` … behind it.

    Making it is what claims it: of several jobs that start in the same second, each gets its own.
    """
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    parent.mkdir(parents=True, exist_ok=True)
    for n in count(1):
        folder = parent / (stamp if n == 1 else f"{stamp}_{n}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError


def write_config(run_dir: Path, config: DictConfig) -> None:
    """config.yaml, resolved."""
    text = OmegaConf.to_yaml(config, resolve=True)
    write_text(run_dir / "config.yaml", text)


Record = Callable[[Path, str], object]
"""Told a folder that is whole, and the name that it will have; what it writes is there before anybody finds the folder."""


def export_model(
    module: LogProbModule,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    trainer: Trainer,
    *,
    record: Record,
    keep_existing: bool = False,
) -> str | None:
    """Write plain safetensors, configuration and tokenizer; every process must call this, the first one writes.

    A model with LoRA adapters is written twice: merged, as a plain model, and its adapters alone in ``adapter/`` beside it.
    Where they can't be merged, ``adapter/`` is the result, and why is returned; so is a vector's.

    Args:
        keep_existing: a folder that another run made meanwhile stays.

    Raises:
        FailedWrite: a full disk …, on all processes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model = module.trained_policy.model
    state: dict[str, Any] = get_model_state_dict(model, options=options)

    def export() -> str | None:
        whole, tensors = model, state
        vector = trained_vector(model)
        if vector is not None:
            _export_vector(vector, folder.with_name(ADAPTER_FOLDER), record)
        if module.writes_adapter:
            _export_own(module, folder.with_name(ADAPTER_FOLDER), record)
        if module.lora is not None:
            _export_adapters(model, state, folder.with_name(ADAPTER_FOLDER), record)
        if module.keeps_base:
            try:
                whole, tensors = module.factory.make_merged(state)
            except UserError as error:
                shutil.rmtree(folder, ignore_errors=True)  # of an earlier end of this run
                return str(error)

        def write(temporary: Path) -> None:
            whole.save_pretrained(temporary, state_dict=tensors, safe_serialization=True)
            tokenizer.save_pretrained(temporary)
            record(temporary, folder.name)

        write_atomically(folder, write, keep_existing=keep_existing)
        return None

    return on_first_process(export, trainer)


def on_first_process(write: Callable[[], T], trainer: Trainer) -> T | None:
    """Let the first process write while the others wait, and return what it returned, there alone; where it fails, all end alike.

    Raises:
        FailedWrite, UserError: it failed.
    """
    failure: FailedWrite | UserError | None = None
    written = None
    if trainer.is_global_zero:
        try:
            written = write()
        except (FailedWrite, UserError) as error:
            failure = error
    failure = trainer.strategy.broadcast(failure)
    if failure is not None:
        raise failure
    return written


def _export_adapters(model: PreTrainedModel, state: dict[str, Tensor], folder: Path, record: Record) -> None:
    """Write what peft reads, to be put on ``base/``; it names its base only when that is on the hub."""
    name = model.config._name_or_path
    model.peft_config[ADAPTER].base_model_name_or_path = None if Path(name).is_dir() else name

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary, state_dict=state)
        record(temporary, folder.name)

    write_atomically(folder, write)


def _export_own(module: LogProbModule, folder: Path, record: Record) -> None:
    """Write what a module trains in a form of its own."""

    def write(temporary: Path) -> None:
        temporary.mkdir()
        module.write_adapter(temporary)
        record(temporary, folder.name)

    write_atomically(folder, write)


def _export_vector(vector: TrainedVector, folder: Path, record: Record) -> None:
    """Write a trained vector, to be added to what ``base/`` computes, or swept like others (``steering.vectors``)."""
    values = vector.values.detach().float().cpu()
    made = "trained with the run's loss, the model frozen; added to every token"

    def write(temporary: Path) -> None:
        temporary.mkdir()
        save_vectors(
            temporary / VECTOR_FILE, {"trained": SteeringVector(VectorId(TRAINED, vector.site), values, made=made)}
        )
        record(temporary, folder.name)

    write_atomically(folder, write)


def keep_base(run_dir: Path, model: CausalLM, tokenizer: PreTrainedTokenizerBase, revision: str | None) -> None:
    """``base/``: a copy of the starting model, or a pointer when it is on the hub; one that is there already stays.

    Args:
        revision: the commit of one on the hub.
    """
    folder = run_dir / BASE
    if folder.is_dir():
        return
    source = Path(str(model.name_or_path))

    def write(temporary: Path) -> None:
        temporary.mkdir()
        if source.is_dir():
            for file in source.iterdir():
                if file.is_file() and file.suffix in (".json", ".safetensors", ".txt", ".jinja", ".model"):
                    copy_file(file, temporary / file.name)
            tokenizer.save_pretrained(temporary)
        else:
            write_json(temporary / "pointer.json", {"name": model.name_or_path, "revision": revision})
        record_kept(run_dir, temporary, folder.name)

    write_atomically(folder, write)


def kept_base(run_dir: Path, model: CausalLM) -> CausalLM | None:
    """The starting model as a run that goes on has kept it, one on the hub at its commit; None: nothing was kept yet.

    Raises:
        UserError: it was changed since.
    """
    if not (run_dir / BASE).is_dir():
        return None
    if is_first_process():
        check_kept(run_dir / BASE)
    name, revision = source_of_base(run_dir / BASE)
    return CausalLM(name, revision=revision, dtype=model.dtype, attn_implementation=model.attn_implementation)


def is_first_process() -> bool:
    """True in the process that prints and writes; known before any process group exists."""
    return (getattr(rank_zero_only, "rank", None) or 0) == 0
