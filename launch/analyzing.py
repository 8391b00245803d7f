"""From a composed configuration to a report, of a run or of any two checkpoints."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from analysis.figures.hidden_states import BESIDE_RANDOM, READ_NOW, SECTIONS, hidden_state_section
from analysis.open.checkpoints import Checkpoints, HeldOutPairs, checkpoints_of_run
from analysis.open.observed import Observed, steps_of
from analysis.open.read_states import StateReading
from analysis.open.runs import Run, find_run, open_run
from analysis.open.subject import Subject, subject_of_checkpoints, subject_of_run
from analysis.report.page import Attempts, Section, write_report
from analysis.report.samples import Samples, compare_samples, samples_of_models
from launch.analyses import (
    ASKED,
    NEED_A_RUN,
    OF_FOLDER,
    OPTIONAL,
    chosen_analyses,
    is_set,
    options_of,
    refuse_unused,
)
from launch.asking import Asked, Plan, Question, costs_table
from launch.configuration import check_config, expand_home
from launch.run_folder import claim_folder
from launch.run_lock import check_writable
from launch.screen import console
from launch.wandb_report import check_upload, upload_report
from tiltmeter.commands import command, setting
from tiltmeter.errors import IncompleteEvaluation, UserError
from tiltmeter.models.causal_lm import KERNELS
from tiltmeter.pairs.chat import as_date


class Wanted(NamedTuple):
    """What the command line asks for, built but not begun."""

    names: Mapping[str, bool]
    """Analyses, and whether each was asked for by its name."""
    questions: Mapping[str, Question]
    """Those that ask models."""
    reading: StateReading
    dry_run: bool
    upload: bool
    kernel: str | None
    """Of attention; None: a run's own, else the family's."""
    attempts: Attempts
    """Analyses that fail, of which none costs the others."""


def analyze(config: DictConfig) -> Path | None:
    """Open what is asked about, ask, write the report; returns the page, or None for a dry run.

    Nothing is written before all is computed, but for a sweep's table, which a later command goes on with.

    Raises:
        UserError: wrong input.
        FailedWrite: a full disk ….
        IncompleteEvaluation: the report is written, but an analysis failed, or figures have no number, because too many scores
            are missing.
    """
    expand_home(config)
    check_config(config, config_name="analyze")
    of_run = _asks_of_run(config)
    names = chosen_analyses(config.analysis, of_run=of_run)
    refuse_unused(names, of_run=of_run)
    run = open_run(find_run(str(config.run), Path(config.runs_root))) if of_run else None
    as_date(config.chat_date)
    if run is not None and OmegaConf.is_interpolation(config, "chat_date"):
        config.chat_date = run.setting("chat_date")
    questions = {name: instantiate(config[ASKED[name]]) for name in names if name in ASKED}
    wanted = Wanted(
        names,
        questions,
        instantiate(config.hidden_states),
        config.dry_run,
        config.upload,
        config.attn_implementation,
        Attempts(debug=config.debug, named=[name for name, is_named in names.items() if is_named]),
    )
    if config.attn_implementation not in (None, *KERNELS):
        raise UserError(f"attn_implementation: expected sdpa or eager, got {config.attn_implementation}")
    if run is not None:
        return _analyze_run(wanted, run)
    return _analyze_checkpoints(config, wanted)


def _asks_of_run(config: DictConfig) -> bool:
    given = {name for name in ("run", "base", "aligned") if config[name] not in (None, "")}
    if given not in ({"run"}, {"base", "aligned"}):
        raise UserError(
            "run: expected a run folder, for example run=runs/tiny_synthetic/2026-01-31_12-00-00, or run=last; or two checkpoints, "
            f"base=… aligned=… data=…; got {' and '.join(sorted(given)) or 'neither'}"
        )
    if "run" not in given and config.get("data") is None:
        raise UserError("data: expected where prompts come from, got none; add data=hh, data=oasst1 or data=synthetic")
    return "run" in given


def _analyze_run(wanted: Wanted, run: Run) -> Path | None:
    attempts = wanted.attempts
    if wanted.upload:
        check_upload(run)
    if not wanted.dry_run:
        check_writable(run.report, key="run")
    opened = cache(partial(checkpoints_of_run, run, attn_implementation=wanted.kernel))
    try:
        plans = _plan(wanted, opened, run.report / "tables")
    except UserError as error:
        if all(wanted.names.values()):
            raise
        raise UserError(f"{error}; or ask for what needs no model, as in analysis=[training,geometry]") from error
    seen = Observed.stored(run.folder, run.metrics)
    lacks_random = bool(set(BESIDE_RANDOM) & set(wanted.names)) and seen.lacks_random
    if lacks_random and not wanted.dry_run:
        seen = _with_random(seen, run, wanted.reading, opened)
    with console().status("Drawing what the run kept …"):
        read = _read_off(wanted.names, run, seen, attempts)
    again = [
        name for name in wanted.names if name in READ_NOW and name not in (*read, *attempts.failed, *attempts.left_out)
    ]
    if not again:
        refuse_unused(wanted.questions, of_run=True)
    try:
        checkpoints = opened(dtype=wanted.reading.dtype, device=wanted.reading.device) if again else None
    except UserError as error:
        raise UserError(
            f"analysis={again[0]}: {run.folder} stored no hidden states for it, and they can’t be read again: {error}"
        ) from error
    if wanted.dry_run:
        _say_costs(
            plans, wanted.reading, checkpoints, random_of=opened() if lacks_random and checkpoints is None else None
        )
        return None
    if checkpoints is not None:
        with attempts.of(*again):
            now = _read(wanted.reading, checkpoints, n_steps=run.n_steps)
            note = f"The run stored nothing for this: hidden states of {now.n_pairs} of its held-out pairs were read again."
            read |= _drawn_now(again, now, note, attempts)
    _check_named(wanted.names, [*read, *attempts.failed])
    asked = _ask(plans, attempts)
    subject = subject_of_run(
        run,
        asked=[*(name for name in again if name in read), *wanted.questions],
        is_read=any(name not in again for name in read),
        left_out=[
            name
            for name in wanted.names
            if name not in (*read, *wanted.questions, *attempts.failed, *attempts.left_out)
        ],
        command=partial(_command, run=run.folder),
    )
    models = plans[0].checkpoints if plans else checkpoints
    samples = partial(compare_samples, run) if models is None else partial(samples_of_models, models)
    upload = partial(upload_report, run) if wanted.upload else None
    return _report(subject, _in_order(wanted.names, read), asked, samples, attempts, upload)


def _with_random(seen: Observed, run: Run, reading: StateReading, opened: Callable[..., Checkpoints]) -> Observed:
    """Read random weight changes and keep them beside the snapshots; where that can't be done, sections say what they lack."""
    try:
        checkpoints = opened(dtype=reading.dtype, device=reading.device)
        with console().status("Reading hidden states under random weight changes …"):
            found = reading.random_updates(checkpoints, n_steps=steps_of(seen.table))
            found.write(run.folder / "snapshots")
    except (UserError, OSError) as error:
        console().print(f"No random weight changes beside the update: {error}", soft_wrap=True)
    return Observed.stored(run.folder, run.metrics)


def _read_off(names: Mapping[str, bool], run: Run, seen: Observed, attempts: Attempts) -> dict[str, Section]:
    """Sections of what the run's folder holds, by name; none for what it doesn't. Raises UserError: it is damaged."""
    found: dict[str, Section] = {}
    for name, is_named in names.items():
        section = None
        with attempts.of(name):
            if name in SECTIONS:
                section = hidden_state_section(name, seen)
            elif name in OF_FOLDER:
                section = (OF_FOLDER if is_named or name not in OPTIONAL else OPTIONAL)[name](run)
        if section is not None:
            found[name] = section
    return found


def _drawn_now(names: Iterable[str], now: Observed, note: str, attempts: Attempts) -> dict[str, Section]:
    """Sections of what was just read; each says so."""
    drawn: dict[str, Section] = {}
    for name in names:
        with attempts.of(name):
            if section := hidden_state_section(name, now):
                drawn[name] = replace(section, reading=[*section.reading, note])
    return drawn


def _check_named(names: Mapping[str, bool], found: Collection[str]) -> None:
    """Refuse to leave out what was asked for by its name. Raises UserError."""
    for name, is_named in names.items():
        if is_named and name not in ASKED and name not in found:
            needs = "a run trained with callbacks=geometry or callbacks=full that took at least one step"
            if name not in NEED_A_RUN:
                needs = f"{needs}, or two models that differ, and at least four pairs whose responses do"
            raise UserError(f"analysis={name}: there are no readings for it (expected {needs})")


def _analyze_checkpoints(config: DictConfig, wanted: Wanted) -> Path | None:
    if config.out or wanted.dry_run:
        folder = Path(config.out or Path(config.runs_root) / "checkpoints" / "report")
        if not wanted.dry_run:
            check_writable(folder, key="out")
        return _analyze_into(folder, config, wanted)
    check_writable(Path(config.runs_root), key="runs_root")
    claimed = claim_folder(Path(config.runs_root) / "checkpoints")
    try:
        return _analyze_into(claimed / "report", config, wanted)
    finally:
        with suppress(OSError):
            claimed.rmdir()  # where nothing was written


def _analyze_into(folder: Path, config: DictConfig, wanted: Wanted) -> Path | None:
    attempts = wanted.attempts
    pairs: HeldOutPairs = instantiate(config.pairs)
    base, aligned = str(config.base), str(config.aligned)
    opened = cache(partial(pairs.ask, base, aligned, instantiate(config.data), attn_implementation=wanted.kernel))
    plans = _plan(
        wanted,
        lambda **how: opened(**how)[0],
        folder / "tables",
        goes_on_with=None if config.out else setting("out", folder),
    )
    now = [name for name in wanted.names if name in READ_NOW]
    first = wanted.reading if now else next(iter(wanted.questions.values()))
    checkpoints, reports, cuts = opened(dtype=first.dtype, device=first.device)
    if wanted.dry_run:
        _say_costs(plans, wanted.reading, checkpoints if now else None)
        return None
    read: dict[str, Section] = {}
    if now:
        with attempts.of(*now):
            states = _read(wanted.reading, checkpoints)
            note = f"Hidden states of {states.n_pairs} pairs were read now, once."
            read = _drawn_now(now, states, note, attempts)
        _check_named(wanted.names, [*read, *attempts.failed])
    asked = _ask(plans, attempts)
    subject = subject_of_checkpoints(
        checkpoints,
        base,
        aligned,
        reports=reports,
        cuts=cuts,
        left_out=() if all(wanted.names.values()) else NEED_A_RUN,
        command=partial(_command, base=base, aligned=aligned),
        report=folder,
    )
    return _report(subject, _in_order(wanted.names, read), asked, partial(samples_of_models, checkpoints), attempts)


def _plan(
    wanted: Wanted, opened: Callable[..., Checkpoints], tables: Path, *, goes_on_with: str | None = None
) -> list[Plan]:
    """What is asked, models opened and judges reached; models of one dtype and device are opened once."""
    return [
        Plan(
            name,
            question,
            opened(dtype=question.dtype, device=question.device),
            tables=tables,
            goes_on_with=goes_on_with,
            takes_old=not (wanted.names[name] or is_set(name)),
            dry_run=wanted.dry_run,
        )
        for name, question in wanted.questions.items()
    ]


def _in_order(names: Iterable[str], found: Mapping[str, Section]) -> list[Section]:
    return [found[name] for name in names if name in found]


def _command(name: str, **about: str | Path) -> str:
    """What makes the section of that name again."""
    return command("analyze.py", *options_of(name), f"analysis={name}", **about)


def _say_costs(
    plans: Sequence[Plan], reading: StateReading, read: Checkpoints | None, *, random_of: Checkpoints | None = None
) -> None:
    """Print what would be run; ``read``: the models whose hidden states would be, ``random_of``: under random weights alone."""
    costs = {} if read is None else {"hidden states": reading.costs(read)}
    costs |= {} if random_of is None else {"hidden states": reading.random_costs(random_of)}
    costs |= {plan.name: plan.costs() for plan in plans}
    if costs:
        console().print(costs_table(costs))
    else:
        console().print("Would run nothing: what is asked is read off the run’s folder.")


def _read(reading: StateReading, checkpoints: Checkpoints, *, n_steps: int | None = None) -> Observed:
    with console().status("Reading hidden states of both models …"):
        return reading.read(checkpoints, n_steps=n_steps)


def _ask(plans: Sequence[Plan], attempts: Attempts) -> list[Asked]:
    """One after another; a sweep shows the time that it has left."""
    answers = []
    for i, plan in enumerate(plans):
        console().print(f"Asking both models, {i + 1} of {len(plans)}: {plan.name} …")
        with attempts.of(plan.name, wrong_input=True):
            answers.append(plan.ask())
    return answers


def _report(
    subject: Subject,
    read: Sequence[Section],
    asked: Sequence[Asked],
    samples: Callable[[], Samples],
    attempts: Attempts,
    upload: Callable[[Path, Sequence[Section]], str] | None = None,
) -> Path:
    """Write it, send it where it is wanted, then say what failed and what has no number."""
    sections = [*read, *(one.section for one in asked if one.section)]
    if attempts.failed and not sections:
        error = next(iter(attempts.failed.values()))
        if isinstance(error, UserError):
            raise error
        raise IncompleteEvaluation(f"{subject.report}: not written, {'; '.join(attempts.lines())} ({_SHOW})") from error
    said = next((one.samples for one in asked if one.samples), None)
    with attempts.of("samples"):
        said = said or samples()
    page = write_report(subject, sections, said or Samples([], "They could not be made."), attempts)
    if upload is not None:
        console().print(
            upload(page, [section for section in sections if section.name not in attempts.failed]),
            soft_wrap=True,
        )
    for line in attempts.lines_left_out():
        console().print(line, soft_wrap=True, markup=False)
    missing = [f"{'; '.join(attempts.lines())} ({_SHOW})"] if attempts.failed else []
    if lost := [name for one in asked for name in one.lost]:
        missing.append(
            f"without a number for {', '.join(lost[:4])}{' …' if len(lost) > 4 else ''}: too many scores are missing (the table "
            "says how many); where a judge or service did not answer, run it again"
        )
    if missing:
        raise IncompleteEvaluation(f"{page}: written, but {'; '.join(missing)}")
    return page


_SHOW = "debug=true shows where"
