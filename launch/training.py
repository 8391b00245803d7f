"""From a composed configuration to a trained run."""

import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from analysis.open.kept_models import check_kept, record_kept
from callbacks.behaviour.acceptance import Acceptance
from callbacks.behaviour.generation_metrics import GenerationMetrics
from callbacks.behaviour.scoring import forget_steps_ahead
from callbacks.behaviour.truthfulqa_metrics import TruthfulQAMetrics
from callbacks.probe_session import report_failed_write
from callbacks.process.preemption import Preemption
from callbacks.process.random_state import RandomState
from datamodules.preference import PreferenceDataModule
from launch.base_model import find_or_train_base, merge_adapter_into_base, progress_callbacks
from launch.command import one_line_errors
from launch.loggers.metrics_csv import MetricsCSV
from launch.loggers.tensorboard import MODE as TENSORBOARD
from launch.loggers.tensorboard import open_tensorboard
from launch.loggers.wandb_logger import RunLogger, close_wandb, open_wandb
from launch.loggers.wandb_media import WandbMedia
from launch.made_models import quantized
from launch.parts import Parts, build_parts, check_length, check_options
from launch.processes.agreement import agreement
from launch.processes.run_lock import check_writable, run_lock
from launch.processes.slurm import checkpoint_of_this_job, note_job, requeued_when_asked
from launch.results import behaviour_of, geometry_of, provenance, result_rows, versions, write_provenance, write_results
from launch.resuming import (
    SETTINGS,
    check_same_data,
    check_same_model,
    check_same_run,
    check_step_is_left,
    clean_up,
    find_checkpoint,
    keep_chat_date,
    settings_sha256,
)
from launch.run_folder import (
    claim_folder,
    export_model,
    is_first_process,
    keep_base,
    kept_base,
    on_first_process,
    write_config,
)
from launch.screen import behaviour_table, console, data_table, geometry_tables, quiet_libraries, result_table
from lightning_modules.checkpoint_io import CommittedCheckpointIO
from tiltmeter.checkpoint_files import newest_valid, verify
from tiltmeter.commands import setting
from tiltmeter.errors import FailedWrite, NumericalStop, UserError
from tiltmeter.judges.judge_scorer import JudgeScorer
from tiltmeter.models.lora import why_not_merged


def train(config: DictConfig) -> Path:
    """Train one run. Wrong input ends the process with one line and exit code 2; returns the run folder."""
    quiet_libraries()
    created: list[Path] = []

    def forget() -> None:
        for folder in created:  # a run that never took a step leaves nothing behind; one that did loses nothing
            if not any((folder / name).exists() for name in ("metrics.csv", "checkpoints", "aligned")):
                shutil.rmtree(folder, ignore_errors=True)

    with one_line_errors(config, clean_up=forget), requeued_when_asked(), ExitStack() as held:
        return _train(config, created, held)


def _train(config: DictConfig, created: list[Path], held: ExitStack) -> Path:
    check_options(config)
    is_first = is_first_process()
    screen = console(enabled=is_first)
    root = Path(config.runs_root)
    checkpoint, found, changed = _checkpoint_to_resume(config, root, held)
    _say(screen, [*found, *(f"Changed: {line}" for line in changed)])
    run_dir = (
        checkpoint.parent.parent if checkpoint else root / config.name
    )  # below it, once the first process has claimed it
    check_writable(run_dir, key="runs_root")
    config.run_dir = str(run_dir)
    watching = watching_callbacks(config)
    planned = make_trainer(config, watching, [])  # options that only a trainer can judge, before a base is trained
    parts = build_parts(config)
    check_length(planned, parts.data)
    if checkpoint is not None:
        check_same_data(checkpoint, parts.data)
        check_same_model(checkpoint, config)
    _say(screen, start_scorers(watching, parts.data))
    screen.print(data_table(parts.data, parts.data.labels))
    _say(screen, _settle_base(config, parts, checkpoint))
    _say(screen, _unmerged("will be", _why_not_merged(parts)))
    seed_everything(config.seed, verbose=False)
    _attach(parts, root)

    if is_first and checkpoint is None:
        run_dir = _claim(run_dir, created, held)
        config.run_dir = str(run_dir)

    def begin(trainer: Trainer) -> None:
        """Everything that is written before the first step; nothing can refuse the run any more."""

        def write() -> None:
            with nothing_was_started():
                _say(screen, _begin(config, run_dir, parts, checkpoint, changed, trainer))

        on_first_process(write, trainer)
        parts.module.throughput.start()

    accepted = Acceptance(begin)
    agreed = agreement(config, parts.data, trains="the run", resumes=checkpoint is not None)
    trainer = make_trainer(config, [accepted, agreed, *watching], [])
    started = time.perf_counter()
    with what_is_kept(run_dir):
        trainer.fit(
            parts.module, datamodule=parts.data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True
        )
        accepted.accept(trainer)  # no step was left to take
        seconds = time.perf_counter() - started
        run_dir = Path(trainer.strategy.broadcast(str(run_dir)))
        _say(screen, _unmerged("is", _keep(run_dir, parts, trainer)))
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            close_wandb(logger)
    with what_is_kept(run_dir):
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.finish()
    for table in closing_tables(run_dir, parts, trainer, seconds) if trainer.is_global_zero else ():
        screen.print(table)
    screen.print(f"Run: {run_dir}\nNext: {parts.module.next_command(run_dir)}", soft_wrap=True)
    return run_dir


def _say(screen: Console, lines: Iterable[str]) -> None:
    for line in lines:
        screen.print(line, soft_wrap=True, markup=False)


def _settle_base(config: DictConfig, parts: Parts, checkpoint: Path | None) -> Iterator[str]:
    """The model that training starts from: a run that goes on has kept its own, others find, train or are given one."""
    if parts.module.factory.sae is not None:
        yield f"Autoencoder: {parts.module.factory.sae.describe()}"
    if checkpoint is not None and (kept := kept_base(checkpoint.parent.parent, parts.model)):
        parts.model = kept
        yield f"Base: found in {kept.name_or_path}"
    elif config.base is not None:
        parts.model, line = find_or_train_base(config, parts.model, parts.tokenizer, parts.data)
        yield line
    elif parts.model.adapter_path is not None or parts.model.quantization is not None:
        for is_asked, make in (
            (parts.model.adapter_path, merge_adapter_into_base),
            (parts.model.quantization, quantized),
        ):
            if is_asked is not None:
                parts.model, line = make(parts.model, parts.tokenizer, Path(config.runs_root))
                yield line
    elif is_first_process() and (given := Path(str(parts.model.name_or_path))).is_dir():
        check_kept(given)  # a run's own aligned/ …


def _claim(parent: Path, created: list[Path], held: ExitStack) -> Path:
    """A new run's folder, empty and locked."""
    with nothing_was_started():
        run_dir = claim_folder(parent)
        created.append(run_dir)
        held.enter_context(run_lock(run_dir))
        return run_dir


@contextmanager
def nothing_was_started() -> Iterator[None]:
    """A write that fails before the first step is wrong input: a folder without room or permission."""
    try:
        yield
    except OSError as error:
        raise UserError(f"runs_root: {error}; nothing was started; make room or choose another folder") from error


def _attach(parts: Parts, root: Path) -> None:
    """Tell the module how its model is made, and where reference log-probs are kept."""
    model, tokenizer = parts.model, parts.tokenizer
    parts.module.attach_model(
        lambda: model.build(tokenizer),
        lambda: model.build_empty(tokenizer),
        reference_cache=root / "cache" / "reference",
    )


def _why_not_merged(parts: Parts) -> str | None:
    """One line on why the adapters can't be merged, tried before anything is trained; None where they can, or there are none."""
    if parts.module.factory.not_merged is not None:
        return parts.module.factory.not_merged
    if parts.module.lora is None:
        return None
    return why_not_merged(parts.model.build_on_meta(parts.tokenizer), parts.module.lora)


def _unmerged(tense: str, reason: str | None) -> list[str]:
    return [] if reason is None else [f"Adapter: adapter/ {tense} the result, without aligned/: {reason}"]


def _checkpoint_to_resume(config: DictConfig, root: Path, held: ExitStack) -> tuple[Path | None, list[str], list[str]]:
    """The checkpoint, once its run folder is locked, what was found on the way, and the settings that are changed."""
    checkpoint, lines = checkpoint_of_this_job(config), list[str]()
    if checkpoint is None and config.ckpt_path is None:
        return None, [], []
    if checkpoint is None:
        checkpoint, lines = find_checkpoint(config.ckpt_path, root, config.name)
    keep_chat_date(checkpoint, config)
    changed = check_same_run(checkpoint, config)
    if is_first_process():
        for folder in (checkpoint.parent.parent, checkpoint.parent):
            check_writable(folder, key="ckpt_path")
        before = held.enter_context(run_lock(checkpoint.parent.parent))
        lines += [f"Lock taken over: {before} is gone"] if before else []
    return checkpoint, [*lines, f"Resuming: {checkpoint}"], changed


def _begin(
    config: DictConfig, run_dir: Path, parts: Parts, checkpoint: Path | None, changed: list[str], trainer: Trainer
) -> Iterator[str]:
    """Write what a run's folder holds from its start on, and open its loggers; yields lines about it."""
    if trainer.state.finished:
        check_step_is_left(changed)
    if checkpoint is not None:
        forget_steps_ahead(trainer)
        yield from clean_up(checkpoint.parent)
    write_config(run_dir, config)
    note_job(run_dir)
    write_provenance(run_dir, parts, step=trainer.global_step, changed=changed)
    keep_base(run_dir, parts.model, parts.tokenizer, parts.model_revision)
    trainer.loggers, line = _open_loggers(config, run_dir, parts, checkpoint)
    trainer.callbacks.extend(  # type: ignore[attr-defined]
        WandbMedia(logger, run_dir) for logger in trainer.loggers if isinstance(logger, RunLogger)
    )
    yield line


def closing_tables(run_dir: Path, parts: Parts, trainer: Trainer, seconds: float) -> Iterator[Table]:
    """Tables that a person sees at the end: figures of training, of behaviour, of hidden states."""
    yield result_table(result_rows(parts, trainer, seconds))
    if behaviour := behaviour_of(run_dir):
        yield behaviour_table(behaviour)
    yield from geometry_tables(geometry_of(run_dir))


@contextmanager
def what_is_kept(run_dir: Path) -> Iterator[None]:
    """Say after a numerical stop or a failed write what there still is of the run, and how it goes on."""
    try:
        yield
    except (NumericalStop, FailedWrite) as error:
        saved, _ = newest_valid(run_dir / "checkpoints", contents=False)
        kept = ["aligned/"] if (run_dir / "aligned").is_dir() else []
        if saved is not None:
            step = verify(saved, contents=False).step
            kept.append(f"the checkpoint after step {step}; go on with {setting('ckpt_path', saved)}")
        line = f"{error}. Kept in {run_dir}: {' and '.join(kept) or 'no checkpoint, none had been saved'}"
        if isinstance(error, NumericalStop):
            raise NumericalStop(line) from error
        raise FailedWrite(error.path, error.reason, f"{line}; make room first") from error


def _keep(run_dir: Path, parts: Parts, trainer: Trainer) -> str | None:
    """Write what makes the folder a finished run; every process calls this, the first one writes. As :func:`export_model`."""
    on_first_process(lambda: write_results(run_dir, parts), trainer)
    record = partial(record_kept, run_dir)
    return export_model(parts.module, parts.tokenizer, run_dir / "aligned", trainer, record=record)


def _open_loggers(config: DictConfig, run_dir: Path, parts: Parts, checkpoint: Path | None) -> tuple[list[Logger], str]:
    resume_step = None if checkpoint is None else verify(checkpoint, contents=False).step
    loggers: list[Logger] = [MetricsCSV(run_dir / "metrics.csv", resume_step=resume_step)]
    if config.logger.mode == TENSORBOARD:
        tensorboard, line = open_tensorboard(run_dir, resume_step=resume_step)
        return [*loggers, tensorboard], line
    facts = {**OmegaConf.to_container(config, resolve=True), **provenance(parts)}  # type: ignore[dict-item]
    options: Any = OmegaConf.to_container(config.logger, resolve=True)
    group = config.study_folder or config.name
    wandb_logger, line = open_wandb(run_dir=run_dir, config=facts, name=run_dir.name, group=group, **options)
    return loggers + ([wandb_logger] if wandb_logger is not None else []), line


def start_scorers(callbacks: Sequence[Callback], data: PreferenceDataModule) -> Iterator[str]:
    """Let scorers load or reach what they need, before anything that takes long; yields what a judge will be asked.

    Raises:
        UserError: something is missing.
    """
    for callback in callbacks if is_first_process() else ():
        if isinstance(callback, TruthfulQAMetrics):
            callback.start()
        elif isinstance(callback, GenerationMetrics):
            callback.scoring.start(data)
            for judge in callback.scoring.scorers.values():
                if isinstance(judge, JudgeScorer):
                    n = judge.questions_per_sample * callback.n_prompts * callback.decoding.n_samples
                    once = f", and {2 * judge.agreement.n_pairs} once about pairs that people ranked"
                    yield (
                        f"Judge: {judge.name}; about {n} questions each time{once if judge.agreement.n_pairs else ''}; fewer where "
                        "answers are equal or known"
                    )


def watching_callbacks(config: DictConfig) -> list[Callback]:
    """The callbacks that the configuration names."""
    return [instantiate(node) for node in (config.callbacks or {}).values()]


def make_trainer(config: DictConfig, watching: Sequence[Callback], loggers: list[Logger]) -> Trainer:
    """The trainer of the run, with :func:`watching_callbacks` and those that every run has."""
    callbacks: list[Callback] = progress_callbacks(config, config.arm)
    last = None
    if config.trainer.get("enable_checkpointing", True):
        last = instantiate(config.last_checkpoint)
        callbacks += [instantiate(config.checkpoint), last]
    callbacks += [Preemption(last), *watching, RandomState()]
    never = {"limit_val_batches": 0} if config.datamodule.get("val_pairs") == 0 else {}
    trainer: Trainer = instantiate(
        config.trainer,
        **never,
        logger=loggers or False,
        callbacks=callbacks,
        default_root_dir=config.run_dir,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.strategy.checkpoint_io = CommittedCheckpointIO(
        {SETTINGS: settings_sha256(config), "versions": versions()},
        on_failure=lambda path, error: report_failed_write(path, error, trainer, alarm="checkpoint"),
    )
    return trainer
