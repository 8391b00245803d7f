"""A study: runs of several arms and seeds from one base, trained one after the other, found again, and gone on with.

``study.yaml`` in the study's folder says which runs there are to be and what has become of each; the runs themselves are run
folders like any other, which say in their config.yaml to which study they belong.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1, signal
from typing import IO, Any, NamedTuple

import yaml
from filelock import FileLock, Timeout
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from analysis.open.studies import DPO, FILE
from launch.configuration import CONF
from launch.parts import check_options
from launch.screen import console
from launch.studies.matching import Ended, Matching
from launch.studies.study_file import FORMAT, Arm, found_in, runs_of, tries_of, write_study
from tiltmeter.checkpoint_files import newest_valid
from tiltmeter.commands import command
from tiltmeter.errors import UserError
from tiltmeter.plain_text import did_you_mean

_SET_BY_STUDY = {
    "arm": "study.arms",
    "seed": "study.first_seed and the number of seeds in study.arms",
    "study_folder": "its own",
    "ckpt_path": "runs that were stopped go on by themselves",
}
"""Key of a run → what it follows from."""
_ONLY_SHOWN = {"--cfg", "-c", "--help", "-h", "--hydra-help", "--info", "-i"}
"""Flags with which Hydra shows something and starts nothing."""
_FORWARDED = (SIGINT, SIGTERM, SIGUSR1)
"""Signals that end a run behind its step, when they come once."""
_STOPPED = (143, 130)
"""Exit codes of a run that was told to stop, and so was its study."""
_PREFIX = "tiltmeter: "
_LAUNCHER = "hydra/launcher="
"""Start of the override by which Hydra starts the jobs of a sweep at once, or on a cluster."""
Start = Callable[[Sequence[str]], tuple[int, str]]
"""Trains one run by the words of its command line; gives the exit code and the end of what it said."""


def study_of(overrides: Sequence[str]) -> str | None:
    """Name of the study that a command line asks for; None: one run, or a sweep of them."""
    if _ONLY_SHOWN & {*overrides}:
        return None
    asked = [text.partition("=")[2] for text in overrides if text.lstrip("+").partition("=")[0] == "study"]
    return asked[-1] if asked and asked[-1] not in ("", "null") else None


def run_study(overrides: Sequence[str], *, start: Start | None = None) -> Path:
    """Train every run of a study that isn't finished yet; returns the study's folder.

    Args:
        overrides: the command line, checked (:func:`launch.configuration.prepare_overrides`), flags among them.
        start: trains one run; None: :func:`start_process`.

    Raises:
        UserError: wrong options, a study without dpo, or another process is at it.
    """
    for text in overrides:
        key = _key(text).partition(".")[0]
        if key in _SET_BY_STUDY:
            raise UserError(f"{key}: a study sets it itself ({_SET_BY_STUDY[key]}); leave it out")
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", overrides=[text for text in overrides if not text.startswith(("-", "hydra"))])
    except HydraException as error:
        said = str(error).strip().splitlines()[0]
        raise UserError(
            f"study: {said}; a study takes one value of each option, and its arms and seeds from study"
        ) from error
    check_options(config)
    planned = _planned(config)
    kept = [text for text in overrides if text not in ("--multirun", "-m") and _key(text).partition(".")[0] != "study"]
    folder = _folder(Path(config.runs_root) / config.name, kept)
    try:
        with FileLock(folder / ".study.lock", timeout=0):
            return _train_all(Plan(folder, planned, kept, config, tries_of(folder)), start or start_process)
    except Timeout:
        raise UserError(f"{folder}: another process is training this study; wait for it or stop it") from None


class Plan(NamedTuple):
    """Everything that a study is to be."""

    folder: Path
    runs: Sequence[Arm]
    overrides: Sequence[str]
    config: DictConfig
    """Everything that its runs have in common."""
    tries: list[dict[str, Any]]
    """Runs of arms whose learning rate is set by their KL: arm, seed, run, learning_rate and kl; grows."""

    @property
    def matched(self) -> list[str]:
        """Arms whose learning rate is set so that they go as far from the base as dpo."""
        return [str(arm) for arm in self.config.study.kl_matched]

    @property
    def is_spread(self) -> bool:
        """Whether a launcher takes all seeds of an arm at once."""
        return any(text.startswith(_LAUNCHER) for text in self.overrides)


def _planned(config: DictConfig) -> list[Arm]:
    arms: Any = OmegaConf.to_container(config.study.arms)
    for key, value in {
        **{f"arms.{arm}": n for arm, n in arms.items()},
        "draws": config.study.draws,
        "kl_tries": config.study.kl_tries,
        "first_seed": config.study.first_seed,
    }.items():
        if not isinstance(value, int) or value < 0:
            raise UserError(f"study.{key}: expected a whole number from 0, got {value}")
    _check_matched(config)
    known = sorted(path.stem for path in (CONF / "arm").glob("*.yaml"))
    if unknown := [arm for arm in arms if arm not in known]:
        raise UserError(
            f"study.arms: there is no arm {unknown[0]}{did_you_mean(unknown[0], known)} (there are: {', '.join(known)})"
        )
    by_seed = sorted((i, place, arm) for place, (arm, n) in enumerate(arms.items()) for i in range(n))
    if not any(arm == DPO for _, _, arm in by_seed):
        raise UserError("study.arms.dpo: expected at least one seed of what the claims are about, got none")
    # one of each arm first: a study that is stopped has them all
    return [Arm(arm, int(config.study.first_seed) + i) for i, _, arm in by_seed]


def _check_matched(config: DictConfig) -> None:
    """Refuse to match an arm that there isn't, or no try at all, and options of no arm. Raises UserError."""
    for arm, texts in config.study.options.items():
        if (
            arm not in config.study.arms
            or not isinstance(texts, ListConfig)
            or not all("=" in str(text) for text in texts)
        ):
            raise UserError(
                f"study.options.{arm}: expected an arm of study.arms with a list such as ['module.learning_rate=1e-3'], got {texts}"
            )
    if config.study.kl_matched and config.study.kl_tries < 1:
        raise UserError("study.kl_tries: expected at least 1; study.kl_matched=[] leaves learning rates as they are")
    for arm in map(str, config.study.kl_matched):
        if arm not in config.study.arms or arm == DPO:
            raise UserError(f"study.kl_matched: expected arms of study.arms beside {DPO}, got {arm}")


def _folder(root: Path, overrides: Sequence[str]) -> Path:
    """The newest study of the same options, whatever arms and seeds it has so far, or a new folder."""
    for folder in sorted(root.glob("study_*"), reverse=True):
        with suppress(OSError, yaml.YAMLError, KeyError, TypeError):
            said = yaml.safe_load((folder / FILE).read_text(encoding="utf-8"))
            if (said["format"], said["overrides"]) == (FORMAT, list(overrides)):
                return folder
    folder = root / f"study_{datetime.now().astimezone():%Y-%m-%d_%H-%M-%S}"
    try:
        folder.mkdir(parents=True)
        write_study(folder, overrides, 0, [], [])
    except OSError as error:
        raise UserError(f"runs_root: {error}; nothing was started; make room or choose another folder") from error
    return folder


def _train_all(plan: Plan, start: Start) -> Path:
    screen = console()
    runs, others = found_in(plan.folder, plan.runs, plan.matched)

    def write() -> None:
        write_study(plan.folder, plan.overrides, int(plan.config.study.draws), [*runs, *others], plan.tries)

    write()
    screen.print(f"Study: {plan.folder}", soft_wrap=True)
    for run in (run for run in runs if run.state == "finished"):
        screen.print(f"{run.arm}, seed {run.seed}: found in {run.run}", soft_wrap=True)
    matching: Matching | None = None
    for rows in _together(runs, is_spread=plan.is_spread):
        numbers = f"run {rows[0] + 1}" if len(rows) == 1 else f"runs {', '.join(str(row + 1) for row in rows)}"
        seeds = ", ".join(str(runs[row].seed) for row in rows)
        screen.rule(f"{numbers} of {len(runs)}: {runs[rows[0]].arm}, seed {seeds}{_time_left(runs)}")
        if runs[rows[0]].arm in plan.matched:
            matching = matching or Matching(plan.folder, plan.config, plan.tries, partial(_try, plan, start), write)
            ended = [matching.train(runs[row], runs) for row in rows]
        else:
            ended = _train(plan, [runs[row] for row in rows], start)
        for row, run in zip(rows, ended, strict=True):
            runs[row] = run
        write()
    for run in (run for run in runs if run.state == "failed"):
        screen.print(f"Failed: {run.arm}, seed {run.seed}: {run.error}", soft_wrap=True, markup=False)
    screen.print(f"Study: {plan.folder}\nNext: {command('analyze.py', runs=plan.folder)}", soft_wrap=True)
    return plan.folder


def _together(runs: Sequence[Arm], *, is_spread: bool) -> Iterator[list[int]]:
    """Rows of the runs that are left, one after the other; all seeds of an arm at once where a launcher spreads them."""
    left = [row for row, run in enumerate(runs) if run.state != "finished"]
    if not is_spread:
        yield from ([row] for row in left)
        return
    for arm in dict.fromkeys(runs[row].arm for row in left):
        yield [row for row in left if runs[row].arm == arm]


def _train(plan: Plan, runs: Sequence[Arm], start: Start) -> list[Arm]:
    """Train runs of one arm in one process, or several of its launcher's; a single one goes on where it was stopped."""
    words = _words(plan, runs)
    before = plan.folder.parent / runs[0].run / "checkpoints"
    if plan.is_spread:
        words.insert(0, "--multirun")
    elif runs[0].run and newest_valid(before, contents=False)[0] is not None:
        words.append(f"ckpt_path={before / 'last.ckpt'}")
    done = _start(words, start)
    known = {(run.arm, run.seed): run for run in runs_of(plan.folder)}
    ended = [replace(known.get((run.arm, run.seed), run), minutes=done.minutes) for run in runs]
    return [run if run.state == "finished" else replace(run, state="failed", error=done.error) for run in ended]


def _words(plan: Plan, runs: Sequence[Arm]) -> list[str]:
    """Command line of runs of one arm; its own options take the places of shared ones of the same key or below it."""
    seeds = ",".join(str(run.seed) for run in runs)
    own = [str(text) for text in plan.config.study.options.get(runs[0].arm, ())]
    keys = tuple(f"{_key(text)}." for text in own)
    shared = [text for text in plan.overrides if not f"{_key(text)}.".startswith(keys)]
    return [*shared, *own, f"arm={runs[0].arm}", f"seed={seeds}", f"study_folder={plan.folder.name}"]


def _key(text: str) -> str:
    """Key of a word of the command line."""
    return text.lstrip("+~").partition("=")[0]


def _try(plan: Plan, start: Start, run: Arm, learning_rate: float) -> Ended:
    """Train one run at a learning rate."""
    words = [*_words(plan, [run]), f"module.learning_rate={learning_rate:.12g}"]
    return _start(["--multirun", *words] if plan.is_spread else words, start)


def _start(words: Sequence[str], start: Start) -> Ended:
    """Train by the words of a command line; ends this process where that one was told to stop."""
    started = time.perf_counter()
    code, said = start(words)
    if code in _STOPPED or code < 0:
        sys.exit(code if code > 0 else 128 - code)
    lines = [line.removeprefix(_PREFIX).strip() for line in said.splitlines() if line.startswith(_PREFIX)]
    error = lines[-1] if lines else f"exit code {code}"
    return Ended(code, error, round((time.perf_counter() - started) / 60, 2))


def start_process(words: Sequence[str]) -> tuple[int, str]:
    """Train one run in a process of its own; its exit code, and the last lines of its standard error, which are shown as well.

    The run has a process group of its own, so that Ctrl-C, which a terminal sends to a whole group, reaches it once, through this
    process: a second signal would end it at once instead of behind its step.
    """
    lines: list[str] = []
    with subprocess.Popen(
        [sys.executable, sys.argv[0], *words], stderr=subprocess.PIPE, text=True, errors="replace", process_group=0
    ) as process:
        assert process.stderr is not None
        reader = threading.Thread(target=_pass_on, args=(process.stderr, lines), daemon=True)
        reader.start()
        before = {number: signal(number, lambda given, _: process.send_signal(given)) for number in _FORWARDED}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal(number, handler)
        reader.join()
    return code, "".join(lines)


def _pass_on(source: IO[str], lines: list[str]) -> None:
    for line in source:
        sys.stderr.write(line)
        sys.stderr.flush()
        lines.append(line)
        del lines[:-20]


def _time_left(runs: Sequence[Arm]) -> str:
    known = [run.minutes for run in runs if run.state == "finished" and run.minutes]
    left = sum(run.state == "waiting" for run in runs)
    return f", about {sum(known) / len(known) * left:.0f} min left" if known else ""
