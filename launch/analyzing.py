"""From a composed configuration to a report, of a run or of any two checkpoints."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from analysis.claims.claim import Claim
from analysis.claims.section import NAME as CLAIMS
from analysis.claims.section import claims_section, write_claims
from analysis.contract import Analysis, Asking, Cost
from analysis.open.checkpoints import Checkpoints, HeldOutPairs, checkpoints_of_run
from analysis.open.observed import Observed, steps_of
from analysis.open.read_states import StateReading
from analysis.open.runs import Run, find_run, open_run
from analysis.open.subject import Subject, subject_of_checkpoints, subject_of_run
from analysis.registry import ANALYSES, BY_NAME
from analysis.report.page import Attempts, Section, write_report
from analysis.report.samples import Samples, compare_samples, samples_of_models
from launch.analyses import chosen_analyses, give_corpus, is_set, options_of, refuse_unused
from launch.configuration import check_config, expand_home
from launch.costs import say_costs
from launch.loggers.wandb_report import check_upload, upload_report
from launch.made_models import converted
from launch.processes.run_lock import check_writable
from launch.run_folder import claim_folder
from launch.screen import console
from launch.studies.judging import analyze_study, claims_of, verdicts_of_run
from tiltmeter.commands import command, setting
from tiltmeter.errors import FailedWrite, IncompleteEvaluation, Unsupported, UserError
from tiltmeter.models.causal_lm import KERNELS
from tiltmeter.pairs.chat import as_date
from tiltmeter.pairs.verification import best_layout

_SHOW = "debug=true shows where"


class Wanted(NamedTuple):
    """Everything that the command line asks for, built but not begun."""

    names: Mapping[str, bool]
    """Analyses, and whether each was asked for by its name."""
    questions: Mapping[str, Any]
    """Options of those that ask models."""
    reading: StateReading
    dry_run: bool
    upload: bool
    kernel: str | None
    """Kernel of attention; None: a run's own, else the family's."""
    attempts: Attempts
    """Analyses that fail, of which none costs the others."""
    claims: Sequence[Claim]
    """Claims that stand in a run's whole report; none: in no report of single analyses or of two checkpoints."""

    @property
    def needs_random_weights(self) -> bool:
        """Whether one of the analyses reads hidden states under random weight changes."""
        return any(analysis.needs.random_weights for analysis in self.analyses)

    @property
    def analyses(self) -> list[Analysis]:
        """In the order of the report."""
        return [BY_NAME[name] for name in self.names]


class Plan(NamedTuple):
    """One analysis that can ask its models now."""

    analysis: Analysis
    asking: Asking
    costs: Sequence[Cost]
    """Costs that a dry run prints."""


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
    if config.runs is not None:
        return analyze_study(config)
    of_run = _asks_of_run(config)
    names = chosen_analyses(config.analysis, of_run=of_run)
    has_claims = of_run and not all(names.values())
    refuse_unused(names, of_run=of_run, has_claims=has_claims)
    run = open_run(find_run(str(config.run), Path(config.runs_root))) if of_run else None
    if of_run:
        give_corpus(config)
    as_date(config.chat_date)
    if run is not None and OmegaConf.is_interpolation(config, "chat_date"):
        config.chat_date = run.setting("chat_date")
    wanted = Wanted(
        names,
        {name: instantiate(config[BY_NAME[name].node]) for name in names if BY_NAME[name].node},
        instantiate(config.hidden_states),
        config.dry_run,
        config.upload,
        config.attn_implementation,
        Attempts(debug=config.debug, named=[name for name, is_named in names.items() if is_named]),
        claims_of(config) if has_claims else [],
    )
    if config.attn_implementation not in (None, *KERNELS):
        raise UserError(f"attn_implementation: expected sdpa or eager, got {config.attn_implementation}")
    return _analyze_checkpoints(config, wanted) if run is None else _analyze_run(wanted, run)


def _asks_of_run(config: DictConfig) -> bool:
    given = {name for name in ("run", "base", "aligned") if config[name] not in (None, "")}
    if given not in ({"run"}, {"base", "aligned"}):
        raise UserError(
            "run: expected a run folder, for example run=runs/tiny_synthetic/2026-01-31_12-00-00, or run=last; or two checkpoints, "
            f"base=… aligned=… data=…; or a study, runs=FOLDER; got {' and '.join(sorted(given)) or 'neither'}"
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
    plans = _plan_of_run(wanted, opened, run)
    seen = Observed.stored(run.folder, run.metrics)
    lacks_random = seen.lacks_random and wanted.needs_random_weights
    if lacks_random and not wanted.dry_run:
        seen = _with_random(seen, run, wanted.reading, opened)
    read = _drawn(wanted.analyses, {"run": run, "states": seen}, attempts)
    again = [a for a in _read_now(wanted) if a.name not in (*read, *attempts.unanswered)]
    _check_named(wanted.names, [*read, *attempts.failed, *(a.name for a in again)])
    if not again:
        refuse_unused(wanted.questions, of_run=True, has_claims=bool(wanted.claims))
    checkpoints = _opened_again(again, run, wanted.reading, opened)
    if wanted.dry_run:
        random_of = opened() if lacks_random and checkpoints is None else None
        _say_costs(wanted, plans, checkpoints, random_of=random_of)
        return None
    if checkpoints is not None:
        note = "The run stored nothing for this: hidden states of {} of its held-out pairs were read again."
        read |= _drawn_now(again, wanted, checkpoints, note, n_steps=run.n_steps)
    asked = _ask(plans, attempts)
    upload = partial(upload_report, run) if wanted.upload else None
    subject = _subject_of_run(run, wanted, read, again)
    judged = _judged_alone(wanted, run)
    return _report(
        subject, [*_in_order(read), *asked, *judged], _samples_of_run(run, plans, checkpoints), attempts, upload
    )


def _judged_alone(wanted: Wanted, run: Run) -> list[Section]:
    """The section of claims that one run can say something about."""
    found = list[Section]()
    with wanted.attempts.of(CLAIMS):
        verdicts = verdicts_of_run(wanted.claims, run)
        if verdicts:
            write_claims(run.report, verdicts)
            found.append(replace(claims_section(verdicts), headlines=[]))  # none is judged
    return found


def _samples_of_run(run: Run, plans: Sequence[Plan], checkpoints: Checkpoints | None) -> Callable[[], Samples]:
    models = plans[0].asking.models if plans else checkpoints
    return partial(compare_samples, run) if models is None else partial(samples_of_models, models)


def _plan_of_run(wanted: Wanted, opened: Callable[..., Checkpoints], run: Run) -> list[Plan]:
    try:
        return _plan(wanted, opened, run.report / "tables")
    except UserError as error:
        if all(wanted.names.values()):
            raise
        raise UserError(f"{error}; or ask for what needs no model, as in analysis=[training,geometry]") from error


def _subject_of_run(run: Run, wanted: Wanted, read: Collection[str], read_now: Sequence[Analysis]) -> Subject:
    again = [analysis.name for analysis in read_now]
    told = {*read, *wanted.questions, *wanted.attempts.unanswered}
    return subject_of_run(
        run,
        asked=[*(name for name in again if name in read), *wanted.questions],
        is_read=not {*read} <= {*again},
        left_out=[name for name in wanted.names if name not in told],
        command=partial(_command, run=run.folder),
    )


def _opened_again(
    again: Sequence[Analysis], run: Run, reading: StateReading, opened: Callable[..., Checkpoints]
) -> Checkpoints | None:
    """Both models of a run, whose hidden states these analyses need; None where none does."""
    try:
        return opened(dtype=reading.dtype, device=reading.device) if again else None
    except UserError as error:
        raise UserError(
            f"analysis={again[0].name}: {run.folder} stored no hidden states for it, and they can’t be read again: {error}"
        ) from error


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


def _read_now(wanted: Wanted) -> list[Analysis]:
    """Analyses for which one reading of two models is enough."""
    return [a for a in wanted.analyses if a.needs.what == "states" and not a.needs.several_steps]


def _drawn(analyses: Iterable[Analysis], given: Mapping[str, Any], attempts: Attempts) -> dict[str, Section]:
    """Sections of what is there, by name; none for what isn't. Raises UserError: it is damaged.

    Args:
        given: by what an analysis needs; others are passed over.
    """
    found: dict[str, Section] = {}
    with console().status("Drawing …"):
        for analysis in (a for a in analyses if a.needs.what in given):
            with attempts.of(analysis.name):
                if section := analysis.answer(given[analysis.needs.what]):
                    found[analysis.name] = section
    return found


def _drawn_now(
    analyses: Sequence[Analysis], wanted: Wanted, checkpoints: Checkpoints, note: str, *, n_steps: int | None = None
) -> dict[str, Section]:
    """Sections of hidden states that are read now; each says so.

    Args:
        note: with a place for the number of pairs.
    """
    names = [analysis.name for analysis in analyses]
    read: dict[str, Section] = {}
    with wanted.attempts.of(*names):
        with console().status("Reading hidden states of both models …"):
            now = wanted.reading.read(checkpoints, n_steps=n_steps)
        read = _drawn(analyses, {"states": now}, wanted.attempts)
        for name, section in read.items():
            read[name] = replace(section, reading=[*section.reading, note.format(now.n_pairs)])
    _check_named({name: wanted.names[name] for name in names}, [*read, *wanted.attempts.failed])
    return read


def _check_named(names: Mapping[str, bool], found: Collection[str]) -> None:
    """Refuse to leave out what was asked for by its name. Raises UserError."""
    for name, is_named in names.items():
        if is_named and BY_NAME[name].needs.what != "models" and name not in found:
            raise UserError(f"analysis={name}: {BY_NAME[name].missing}")


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
    takes_all = all(analysis.every_pair for analysis in wanted.analyses) and "n_pairs" not in config.pairs
    pairs: HeldOutPairs = instantiate(config.pairs, **({"n_pairs": None} if takes_all else {}))
    base, aligned = str(config.base), str(config.aligned)
    root = Path(config.runs_root)
    where = {name: converted(name, root) for name in (base, aligned)}
    opened = cache(
        partial(pairs.ask, where[base], where[aligned], instantiate(config.data), attn_implementation=wanted.kernel)
    )
    plans = _plan(
        wanted,
        lambda **how: opened(**how)[0],
        folder / "tables",
        goes_on_with=None if config.out else setting("out", folder),
    )
    now = _read_now(wanted)
    first = wanted.reading if now else next(iter(wanted.questions.values()))
    checkpoints, reports, cuts = opened(dtype=first.dtype, device=first.device)
    if wanted.dry_run:
        _say_costs(wanted, plans, checkpoints if now else None)
        return None
    note = "Hidden states of {} pairs were read now, once."
    read = _drawn_now(now, wanted, checkpoints, note) if now else {}
    asked = _ask(plans, wanted.attempts)
    subject = subject_of_checkpoints(
        checkpoints,
        base,
        aligned,
        reports=reports,
        cuts=cuts,
        left_out=() if all(wanted.names.values()) else [a.name for a in ANALYSES if a.needs.a_run],
        command=partial(_command, base=base, aligned=aligned),
        report=folder,
    )
    return _report(subject, [*_in_order(read), *asked], partial(samples_of_models, checkpoints), wanted.attempts)


def _plan(
    wanted: Wanted, opened: Callable[..., Checkpoints], tables: Path, *, goes_on_with: str | None = None
) -> list[Plan]:
    """Plan what is asked: models opened, those of one dtype and device once, and judges reached; of a dry run only the costs."""
    plans = []
    for name, question in wanted.questions.items():
        models = opened(dtype=question.dtype, device=question.device)
        asking = Asking(question, models, tables, goes_on_with, takes_old=not (wanted.names[name] or is_set(name)))
        analysis = BY_NAME[name]
        with wanted.attempts.of(name):
            if not wanted.dry_run:
                analysis.start(asking)
            plans.append(Plan(analysis, asking, analysis.cost(asking) if wanted.dry_run else ()))
    return plans


def _in_order(found: Mapping[str, Section]) -> list[Section]:
    return [found[name] for name in BY_NAME if name in found]


def _command(name: str, **about: str | Path) -> str:
    """The command that makes the section of that name again."""
    return command("analyze.py", *options_of(name), f"analysis={name}", **about)


def _say_costs(
    wanted: Wanted, plans: Sequence[Plan], read: Checkpoints | None, *, random_of: Checkpoints | None = None
) -> None:
    """Print what would be run; ``read``: the models whose hidden states would be, ``random_of``: under random weights alone."""
    costs = {} if read is None else {"hidden states": wanted.reading.costs(read)}
    costs |= {} if random_of is None else {"hidden states": wanted.reading.random_costs(random_of)}
    costs |= {plan.analysis.name: list(plan.costs) for plan in plans}
    say_costs(costs, [*wanted.attempts.lines(), *wanted.attempts.lines_left_out()])


def _ask(plans: Sequence[Plan], attempts: Attempts) -> list[Section]:
    """One after another; a sweep shows the time that it has left."""
    sections = []
    for i, plan in enumerate(plans):
        name = plan.analysis.name
        console().print(f"Asking both models, {i + 1} of {len(plans)}: {name} …")
        with attempts.of(name, wrong_input=True):
            sections.append(_answer(plan))
    return [section for section in sections if section is not None]


def _answer(plan: Plan) -> Section | None:
    """Ask.

    Raises:
        Unsupported: it fails, and the models are of a family that no rows can be shared in (ALiBi, state-space layers …).
    """
    try:
        return plan.analysis.answer(plan.asking)
    except (UserError, FailedWrite):
        raise
    except Exception as error:
        model = plan.asking.models.base.model
        if best_layout(model, ()) == "shared_prefix":
            raise
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise Unsupported(f"{type(model).__name__} has no attention that rows can be shared in ({reason})") from error


def _report(
    subject: Subject,
    sections: Sequence[Section],
    samples: Callable[[], Samples],
    attempts: Attempts,
    upload: Callable[[Path, Sequence[Section]], str] | None = None,
) -> Path:
    """Write it, send it where it is wanted, then say what failed and what has no number."""
    if attempts.failed and not sections:
        _refuse_empty(subject, attempts)
    page = write_report(subject, sections, _samples_among(sections, samples, attempts), attempts)
    if upload is not None:
        drawn = [section for section in sections if section.name not in attempts.failed]
        console().print(upload(page, drawn), soft_wrap=True)
    for line in attempts.lines_left_out():
        console().print(line, soft_wrap=True, markup=False)
    if missing := _missing(sections, attempts):
        raise IncompleteEvaluation(f"{page}: written, but {'; '.join(missing)}")
    return page


def _samples_among(sections: Sequence[Section], make: Callable[[], Samples], attempts: Attempts) -> Samples:
    """Samples that a section has already, else those made now."""
    for section in sections:
        if section.samples:
            return section.samples
    with attempts.of("samples"):
        return make()
    return Samples([], "They could not be made.")


def _refuse_empty(subject: Subject, attempts: Attempts) -> NoReturn:
    """Raise the first failure where nothing is left to report."""
    error = next(iter(attempts.failed.values()))
    if isinstance(error, UserError):
        raise error
    raise IncompleteEvaluation(f"{subject.report}: not written, {'; '.join(attempts.lines())} ({_SHOW})") from error


def _missing(sections: Sequence[Section], attempts: Attempts) -> list[str]:
    """Say what failed and which figures have no number."""
    missing = [f"{'; '.join(attempts.lines())} ({_SHOW})"] if attempts.failed else []
    lost = [name for section in sections for name in section.lost]
    if lost := sorted(
        lost, key=lambda name: name.startswith("judge/")
    ):  # what is asked about comes before who is asked
        missing.append(
            f"without a number for {', '.join(lost[:4])}{' …' if len(lost) > 4 else ''}: too many scores are missing (the table "
            "says how many); where a judge or service did not answer, run it again"
        )
    return missing
