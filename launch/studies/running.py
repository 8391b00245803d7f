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
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from signal import SIGINT
from typing import IO, Any

import yaml
from filelock import FileLock, Timeout
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from analysis.open.runs import is_finished, read_config
from launch.configuration import CONF
from launch.parts import check_options
from launch.screen import console
from tiltmeter.checkpoint_files import newest_valid
from tiltmeter.commands import command
from tiltmeter.errors import UserError
from tiltmeter.files import write_text

FILE = "study.yaml"
_SET_BY_STUDY = {
    "arm": "study.arms",
    "seed": "study.first_seed and the number of seeds in study.arms",
    "study_folder": "its own",
    "ckpt_path": "runs that were stopped go on by themselves",
}
"""Key of a run → what it follows from."""
_STOPPED = (143, 130)
"""Exit codes of a run that was told to stop, and so was its study."""
_FORMAT = 1
_PREFIX = "tiltmeter: "
_LAUNCHER = "hydra/launcher="
"""Start of the override by which Hydra starts the jobs of a sweep at once, or on a cluster."""
Start = Callable[[Sequence[str]], tuple[int, str]]
"""Trains one run by the words of its command line; gives the exit code and the end of what it said."""


@dataclass(frozen=True)
class Arm:
    """One run of a study.

    Args:
        state: ``waiting``, ``finished`` or ``failed``.
        run: its folder, from the study's parent.
        minutes: that it took, as far as it is known.
        error: the line that it ended with.
    """

    arm: str
    seed: int
    state: str = "waiting"
    run: str = ""
    minutes: float = 0.0
    error: str = ""


def study_of(overrides: Sequence[str]) -> str | None:
    """Name of the study that a command line asks for; None: one run, or a sweep of them."""
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
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=[text for text in overrides if not text.startswith(("-", "hydra"))])
    check_options(config)
    planned = _planned(config)
    for arm in dict.fromkeys(run.arm for run in planned):
        if not (CONF / "arm" / f"{arm}.yaml").is_file():
            have = ", ".join(sorted(path.stem for path in (CONF / "arm").glob("*.yaml")))
            raise UserError(f"study.arms: there is no arm {arm} (there are: {have})")
    kept = []
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0].partition(".")[0]
        if key in _SET_BY_STUDY:
            raise UserError(f"{key}: a study sets it itself ({_SET_BY_STUDY[key]}); leave it out")
        if key != "study" and text not in ("--multirun", "-m"):
            kept.append(text)
    folder = _folder(Path(config.runs_root) / config.name, planned, kept, int(config.study.draws))
    try:
        with FileLock(folder / ".study.lock", timeout=0):
            return _train_all(folder, planned, kept, int(config.study.draws), start or start_process)
    except Timeout:
        raise UserError(f"{folder}: another process is training this study; wait for it or stop it") from None


def _planned(config: DictConfig) -> list[Arm]:
    arms: Any = OmegaConf.to_container(config.study.arms)
    wrong = [arm for arm, n in arms.items() if not isinstance(n, int) or n < 0]
    if wrong:
        raise UserError(f"study.arms.{wrong[0]}: expected a number of seeds, got {arms[wrong[0]]}")
    first = int(config.study.first_seed)
    by_seed = sorted((i, place, arm) for place, (arm, n) in enumerate(arms.items()) for i in range(n))
    if not any(arm == "dpo" for _, _, arm in by_seed):
        raise UserError("study.arms.dpo: expected at least one seed of what the claims are about, got none")
    return [Arm(arm, first + i) for i, _, arm in by_seed]  # one of each arm first: a study that is stopped has them all


def _folder(root: Path, planned: Sequence[Arm], overrides: Sequence[str], draws: int) -> Path:
    """The newest study of the same plan that isn't complete, or a new folder."""
    plan = {"format": _FORMAT, "overrides": list(overrides), "draws": draws, "plan": [[a.arm, a.seed] for a in planned]}
    for folder in sorted(root.glob("study_*"), reverse=True):
        with suppress(OSError, yaml.YAMLError, KeyError, TypeError):
            said = yaml.safe_load((folder / FILE).read_text(encoding="utf-8"))
            if {key: said[key] for key in plan} == plan:
                return folder
    folder = root / f"study_{datetime.now().astimezone():%Y-%m-%d_%H-%M-%S}"
    try:
        folder.mkdir(parents=True)
        write_text(folder / FILE, yaml.safe_dump(plan | {"runs": []}, sort_keys=False))
    except OSError as error:
        raise UserError(f"runs_root: {error}; nothing was started; make room or choose another folder") from error
    return folder


def _train_all(folder: Path, planned: Sequence[Arm], overrides: Sequence[str], draws: int, start: Start) -> Path:
    screen, found = console(), {(run.arm, run.seed): run for run in runs_of(folder)}
    runs = [found.get((run.arm, run.seed), run) for run in planned]
    _write(folder, runs, overrides, draws)
    screen.print(f"Study: {folder}", soft_wrap=True)
    for run in (run for run in runs if run.state == "finished"):
        screen.print(f"{run.arm}, seed {run.seed}: found in {run.run}", soft_wrap=True)
    for rows in _together(runs, overrides):
        numbers = f"run {rows[0] + 1}" if len(rows) == 1 else f"runs {', '.join(str(row + 1) for row in rows)}"
        seeds = ", ".join(str(runs[row].seed) for row in rows)
        screen.rule(f"{numbers} of {len(runs)}: {runs[rows[0]].arm}, seed {seeds}{_time_left(runs)}")
        for row, run in zip(rows, _train(folder, [runs[row] for row in rows], overrides, start), strict=True):
            runs[row] = run
        _write(folder, runs, overrides, draws)
    failed = [f"{run.arm}, seed {run.seed}: {run.error}" for run in runs if run.state == "failed"]
    for line in failed:
        screen.print(f"Failed: {line}", soft_wrap=True, markup=False)
    screen.print(f"Study: {folder}\nNext: {command('analyze.py', runs=folder)}", soft_wrap=True)
    return folder


def runs_of(folder: Path) -> Iterator[Arm]:
    """Runs that say that they belong to a study, the finished ones and those that can be gone on with."""
    for path in sorted(folder.parent.glob("*/config.yaml")):
        with suppress(UserError):
            config = read_config(path)
            if config.get("study_folder") != folder.name:
                continue
            run, finished = path.parent, is_finished(path.parent)
            minutes = (path.parent / "metrics.csv").stat().st_mtime - path.stat().st_mtime if finished else 0.0
            state = "finished" if finished else "waiting"
            yield Arm(str(config["arm"]), int(config["seed"]), state, run.name, round(max(minutes, 0.0) / 60, 2))


def _together(runs: Sequence[Arm], overrides: Sequence[str]) -> Iterator[list[int]]:
    """Rows of the runs that are left, one after the other; all seeds of an arm at once where a launcher spreads them."""
    left = [row for row, run in enumerate(runs) if run.state != "finished"]
    if not any(text.startswith(_LAUNCHER) for text in overrides):
        yield from ([row] for row in left)
        return
    for arm in dict.fromkeys(runs[row].arm for row in left):
        yield [row for row in left if runs[row].arm == arm]


def _train(folder: Path, runs: Sequence[Arm], overrides: Sequence[str], start: Start) -> list[Arm]:
    """Train runs of one arm in one process, or several of its launcher's; a single one goes on where it was stopped."""
    words = [
        *overrides,
        f"arm={runs[0].arm}",
        f"seed={','.join(str(run.seed) for run in runs)}",
        f"study_folder={folder.name}",
    ]
    is_spread = any(text.startswith(_LAUNCHER) for text in overrides)
    before = folder.parent / runs[0].run / "checkpoints"
    if is_spread:
        words.insert(0, "--multirun")
    elif runs[0].run and newest_valid(before, contents=False)[0] is not None:
        words.append(f"ckpt_path={before / 'last.ckpt'}")
    started = time.perf_counter()
    code, said = start(words)
    if code in _STOPPED or code < 0:
        sys.exit(code if code > 0 else 128 - code)
    minutes = round((time.perf_counter() - started) / 60, 2)
    known = {(run.arm, run.seed): run for run in runs_of(folder)}
    lines = [line.removeprefix(_PREFIX).strip() for line in said.splitlines() if line.startswith(_PREFIX)]
    ended = []
    for run in runs:
        done = replace(known.get((run.arm, run.seed), run), minutes=minutes)
        is_done = done.state == "finished" and (code == 0 or is_spread)
        ended.append(
            done if is_done else replace(done, state="failed", error=lines[-1] if lines else f"exit code {code}")
        )
    return ended


def start_process(words: Sequence[str]) -> tuple[int, str]:
    """Train one run in a process of its own; its exit code, and the last lines of its standard error, which are shown as well."""
    with subprocess.Popen(
        [sys.executable, sys.argv[0], *words], stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        lines: list[str] = []
        assert process.stderr is not None
        reader = threading.Thread(target=_pass_on, args=(process.stderr, lines), daemon=True)
        reader.start()
        try:
            code = process.wait()
        except BaseException:  # an interrupt: the run ends behind its step, and so does the study
            process.send_signal(SIGINT)
            process.wait()
            raise
        reader.join()
    return code, "".join(lines)


def _pass_on(source: IO[str], lines: list[str]) -> None:
    for line in source:
        sys.stderr.write(line)
        sys.stderr.flush()
        lines.append(line)
        del lines[:-20]


def _write(folder: Path, runs: Sequence[Arm], overrides: Sequence[str], draws: int) -> None:
    plan = [[run.arm, run.seed] for run in runs]
    said = {"format": _FORMAT, "overrides": list(overrides), "draws": draws, "plan": plan}
    write_text(folder / FILE, yaml.safe_dump(said | {"runs": [asdict(run) for run in runs]}, sort_keys=False))


def _time_left(runs: Sequence[Arm]) -> str:
    known = [run.minutes for run in runs if run.state == "finished" and run.minutes]
    left = sum(run.state == "waiting" for run in runs)
    return f", about {sum(known) / len(known) * left:.0f} min left" if known else ""
