"""From a composed configuration to a trained run."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from callbacks.generation_metrics import GenerationMetrics
from callbacks.observation import report_failed_write
from callbacks.preemption import Preemption
from callbacks.random_state import RandomState
from callbacks.truthfulqa_metrics import TruthfulQAMetrics
from datamodules.records import PreferenceSource
from launch.agreement import agreement
from launch.base_model import find_or_train_base, progress_callbacks
from launch.command import one_line_errors
from launch.metrics_csv import MetricsCSV
from launch.parts import Parts, build_parts, check_length, check_options
from launch.results import behaviour_of, geometry_of, provenance, result_rows, versions, write_results
from launch.resuming import SETTINGS, check_same_run, clean_up, find_checkpoint, keep_chat_date, settings_sha256
from launch.run_folder import claim_folder, export_model, is_first_process, keep_base, on_first_process, write_config
from launch.run_lock import RunLock, check_writable
from launch.screen import behaviour_table, console, data_table, geometry_tables, quiet_libraries, result_table
from launch.slurm import checkpoint_of_this_job, note_job, requeued_when_asked
from launch.wandb_logger import RunLogger, close_wandb, open_wandb
from launch.wandb_media import WandbMedia
from lightning_modules.checkpoint_io import CommittedCheckpointIO
from lightning_modules.dpo import DPOModule
from tiltmeter.checkpoint_files import newest_valid, verify
from tiltmeter.commands import command, setting
from tiltmeter.errors import FailedWrite, NumericalStop, UserError
from tiltmeter.lora import why_not_merged
from tiltmeter.scoring.judge_scorer import JudgeScorer


def train(config: DictConfig) -> Path:
    """Train one run. Wrong input ends the process with one line and exit code 2; returns the run folder."""
    quiet_libraries()
    created: list[Path] = []

    def forget() -> None:
        for folder in created:  # a run that never took a step leaves nothing behind; one that did loses nothing
            if not any((folder / name).exists() for name in ("metrics.csv", "checkpoints", "aligned")):
                shutil.rmtree(folder, ignore_errors=True)

    with one_line_errors(debug=config.debug, clean_up=forget), requeued_when_asked(), ExitStack() as held:
        return _train(config, created, held)


def _train(config: DictConfig, created: list[Path], held: ExitStack) -> Path:
    check_options(config)
    is_first = is_first_process()
    screen = console(enabled=is_first)
    root = Path(config.runs_root)
    checkpoint = _checkpoint_to_resume(config, root, held, screen)
    run_dir = (
        checkpoint.parent.parent if checkpoint else root / config.name
    )  # below it, once the first process has claimed it
    check_writable(run_dir, key="runs_root")
    config.run_dir = str(run_dir)
    watching = watching_callbacks(config)
    planned = make_trainer(config, watching, [])  # options that only a trainer can judge, before a base is trained
    parts = build_parts(config)
    check_length(planned, parts.data)
    for line in start_scorers(watching, parts.data.source):
        screen.print(line, soft_wrap=True)
    screen.print(data_table(parts.data, parts.data.labels))
    if config.base is not None:
        parts.model, line = find_or_train_base(config, parts.model, parts.tokenizer, parts.data)
        screen.print(line, soft_wrap=True)
    _say_unmerged(screen, "will be", _why_not_merged(parts))
    seed_everything(config.seed, verbose=False)
    _attach(parts, root)

    loggers: list[Logger] = []
    if is_first:
        run_dir = _begin(run_dir, config, created, held, resumes=checkpoint is not None)
        loggers, line = _open_loggers(config, run_dir, parts, checkpoint)
        screen.print(line, soft_wrap=True)
    trainer = make_trainer(
        config, [agreement(config, parts.data, trains="the run", resumes=checkpoint is not None), *watching], loggers
    )
    started = time.perf_counter()
    with what_is_kept(run_dir):
        trainer.fit(
            parts.module, datamodule=parts.data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True
        )
        seconds = time.perf_counter() - started
        run_dir = Path(trainer.strategy.broadcast(str(run_dir)))
        _say_unmerged(screen, "is", _keep(run_dir, parts, trainer))
    for logger in loggers:
        if isinstance(logger, RunLogger):
            close_wandb(logger)
    with what_is_kept(run_dir):
        for logger in loggers:
            if isinstance(logger, MetricsCSV):
                logger.finish()
    for table in closing_tables(run_dir, parts, trainer, seconds) if trainer.is_global_zero else ():
        screen.print(table)
    screen.print(f"Run: {run_dir}\nNext: {command('analyze.py', run=run_dir)}", soft_wrap=True)
    return run_dir


def _begin(run_dir: Path, config: DictConfig, created: list[Path], held: ExitStack, *, resumes: bool) -> Path:
    """The run folder, claimed and locked unless the run goes on in it, with the configuration written."""
    try:
        if not resumes:
            run_dir = claim_folder(run_dir)
            created.append(run_dir)
            config.run_dir = str(run_dir)
            held.enter_context(RunLock(run_dir))
        write_config(run_dir, config)
        note_job(run_dir)
    except OSError as error:
        raise UserError(f"runs_root: {error}; nothing was started; make room or choose another folder") from error
    return run_dir


def _attach(parts: Parts, root: Path) -> None:
    """Tell the module how its model is made, and where reference log-probs are kept."""
    model, tokenizer = parts.model, parts.tokenizer
    parts.module.attach_model(lambda: model.build(tokenizer), lambda: model.build_empty(tokenizer))
    if isinstance(parts.module, DPOModule):
        parts.module.reference_cache_dir = root / "cache" / "reference"


def _why_not_merged(parts: Parts) -> str | None:
    """One line on why the adapters can't be merged, tried before anything is trained; None where they can, or there are none."""
    if parts.module.lora is None:
        return None
    return why_not_merged(parts.model.build_on_meta(parts.tokenizer), parts.module.lora)


def _say_unmerged(screen: Console, tense: str, reason: str | None) -> None:
    if reason is not None:
        screen.print(f"LoRA: adapter/ {tense} the result, without aligned/: {reason}", soft_wrap=True, markup=False)


def _checkpoint_to_resume(config: DictConfig, root: Path, held: ExitStack, screen: Console) -> Path | None:
    """The checkpoint, once its run folder is locked and cleaned up; says what was found on the way."""
    checkpoint, lines = checkpoint_of_this_job(config), list[str]()
    if checkpoint is None and config.ckpt_path is None:
        return None
    if checkpoint is None:
        checkpoint, lines = find_checkpoint(config.ckpt_path, root, config.name)
    keep_chat_date(checkpoint, config)
    lines += check_same_run(checkpoint, config)
    if is_first_process():
        for folder in (checkpoint.parent.parent, checkpoint.parent):
            check_writable(folder, key="ckpt_path")
        lock = held.enter_context(RunLock(checkpoint.parent.parent))
        lines += [f"Lock taken over: {lock.taken_over} is gone"] if lock.taken_over else []
        lines += clean_up(checkpoint.parent)
    for line in [*lines, f"Resuming: {checkpoint}"]:
        screen.print(line, soft_wrap=True)
    return checkpoint


def closing_tables(run_dir: Path, parts: Parts, trainer: Trainer, seconds: float) -> Iterator[Table]:
    """What a person sees at the end: figures of training, what the model says, what hidden states did."""
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
    """What makes the folder a finished run; every process calls this, the first one writes. As :func:`export_model` returns."""

    def keep() -> None:
        keep_base(run_dir, parts.model, parts.tokenizer)
        write_results(run_dir, parts)

    on_first_process(keep, trainer)
    return export_model(parts.module, parts.tokenizer, run_dir / "aligned", trainer)


def _open_loggers(config: DictConfig, run_dir: Path, parts: Parts, checkpoint: Path | None) -> tuple[list[Logger], str]:
    facts = {**OmegaConf.to_container(config, resolve=True), **provenance(parts)}  # type: ignore[dict-item]
    options = OmegaConf.to_container(config.logger, resolve=True)
    wandb_logger, line = open_wandb(run_dir=run_dir, config=facts, name=run_dir.name, group=config.name, **options)  # type: ignore[arg-type]
    resume_step = None if checkpoint is None else verify(checkpoint, contents=False).step
    loggers: list[Logger] = [MetricsCSV(run_dir / "metrics.csv", resume_step=resume_step)]
    return loggers + ([wandb_logger] if wandb_logger is not None else []), line


def start_scorers(callbacks: Sequence[Callback], source: PreferenceSource) -> Iterator[str]:
    """Let scorers load or reach what they need, before anything that takes long; yields what a judge will be asked.

    Raises:
        UserError: something is missing.
    """
    for callback in callbacks if is_first_process() else ():
        if isinstance(callback, TruthfulQAMetrics):
            callback.start()
        elif isinstance(callback, GenerationMetrics):
            callback.scoring.start(source)
            for judge in callback.scoring.scorers.values():
                if isinstance(judge, JudgeScorer):
                    n = judge.questions_per_sample * callback.n_prompts * callback.decoding.n_samples
                    yield f"Judge: {judge.name}; about {n} questions each time, fewer where answers are equal or known"


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
    callbacks += [WandbMedia(logger, Path(config.run_dir)) for logger in loggers if isinstance(logger, RunLogger)]
    trainer: Trainer = instantiate(
        config.trainer,
        logger=loggers or False,
        callbacks=callbacks,
        default_root_dir=config.run_dir,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.strategy.checkpoint_io = CommittedCheckpointIO(
        {SETTINGS: settings_sha256(config), "versions": versions()},
        on_failure=lambda path, error: report_failed_write(path, error, trainer, alarm="alarm/checkpoint"),
    )
    return trainer
