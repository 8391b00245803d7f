"""From a composed configuration to a report, of a run or of any two checkpoints."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache, partial
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from analysis.checkpoints import Checkpoints, HeldOutPairs, checkpoints_of_run
from analysis.hidden_states import SECTIONS, Watched, hidden_state_section, section_of_run
from analysis.report import Section, write_report
from analysis.runs import Run, find_run, open_run
from analysis.samples import Samples, compare_samples, samples_of_models
from analysis.subject import Subject, subject_of_checkpoints, subject_of_run
from launch.analyses import ASKED, OF_FOLDER, OPTIONAL, chosen_analyses, is_set, options_of, refuse_unused
from launch.asking import Asked, Plan, Question, costs_table
from launch.configuration import check_config
from launch.screen import console
from tiltmeter.errors import IncompleteEvaluation, UserError


def analyze(config: DictConfig) -> Path | None:
    """Open what is asked about, ask, write the report; returns the page, or None for a dry run.

    Nothing is written before all is computed, but for a sweep's table, which a later command goes on with.

    Raises:
        UserError: wrong input.
        IncompleteEvaluation: the report is written, but figures in it have no number, because too many scores are missing.
    """
    check_config(config, config_name="analyze")
    of_run = _asks_of_run(config)
    names = chosen_analyses(config.analysis, of_run=of_run)
    refuse_unused(names, of_run=of_run)
    questions: dict[str, Question] = {name: instantiate(config[ASKED[name]]) for name in names if name in ASKED}
    if of_run:
        return _analyze_run(config, names, questions)
    return _analyze_checkpoints(config, names, questions)


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


def _analyze_run(config: DictConfig, names: Mapping[str, bool], questions: Mapping[str, Question]) -> Path | None:
    run = open_run(find_run(str(config.run), Path(config.runs_root)))
    subject = subject_of_run(
        run, asked=list(questions), is_read=len(names) > len(questions), command=partial(_command, f"run={run.folder}")
    )
    plans = _plan(config, names, questions, cache(partial(checkpoints_of_run, run)), run.report / "tables")
    if config.dry_run:
        _say_costs(plans)
        return None
    read = [_read(name, run, is_named=is_named) for name, is_named in names.items() if name not in ASKED]
    samples = partial(samples_of_models, plans[0].checkpoints) if plans else partial(compare_samples, run)
    return _report(subject, [section for section in read if section], [_ask(plan) for plan in plans], samples)


def _read(name: str, run: Run, *, is_named: bool) -> Section | None:
    """A section of what the run's folder holds; None for what it doesn't, unless that was asked for by its name."""
    if name in SECTIONS:
        return section_of_run(name, run) if is_named else hidden_state_section(name, Watched.of_run(run))
    return (OF_FOLDER if is_named or name not in OPTIONAL else OPTIONAL)[name](run)


def _analyze_checkpoints(
    config: DictConfig, names: Mapping[str, bool], questions: Mapping[str, Question]
) -> Path | None:
    pairs: HeldOutPairs = instantiate(config.pairs)
    base, aligned = str(config.base), str(config.aligned)
    opened = cache(partial(pairs.ask, base, aligned, instantiate(config.data)))
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path(config.out) if config.out else Path(config.runs_root) / "checkpoints" / stamp / "report"
    plans = _plan(config, names, questions, lambda **how: opened(**how)[0], folder / "tables")
    if config.dry_run:
        _say_costs(plans)
        return None
    first = next(iter(questions.values()))
    checkpoints, reports, cuts = opened(dtype=first.dtype, device=first.device)
    command = partial(_command, f"base={base}", f"aligned={aligned}")
    subject = subject_of_checkpoints(
        checkpoints, base, aligned, reports=reports, cuts=cuts, command=command, report=folder
    )
    return _report(subject, [], [_ask(plan) for plan in plans], partial(samples_of_models, checkpoints))


def _plan(
    config: DictConfig,
    names: Mapping[str, bool],
    questions: Mapping[str, Question],
    opened: Callable[..., Checkpoints],
    tables: Path,
) -> list[Plan]:
    """What is asked, models opened and judges reached; models of one dtype and device are opened once."""
    return [
        Plan(
            name,
            question,
            opened(dtype=question.dtype, device=question.device),
            tables=tables,
            takes_old=not (names[name] or is_set(name)),
            dry_run=config.dry_run,
        )
        for name, question in questions.items()
    ]


def _command(*arguments: str) -> str:
    """What makes one section again; the last argument is its name."""
    *about, name = arguments
    return shlex.join(["python", "analyze.py", *about, *options_of(name), f"analysis={name}"])


def _say_costs(plans: Sequence[Plan]) -> None:
    if plans:
        console().print(costs_table(plans))
    else:
        console().print("Would run nothing: what is asked is read off the run’s folder.")


def _ask(plan: Plan) -> Asked:
    console().print(f"Asking both models: {plan.name} …")
    return plan.ask()


def _report(subject: Subject, read: Sequence[Section], asked: Sequence[Asked], samples: Callable[[], Samples]) -> Path:
    """Write it, then say what has no number."""
    sections = [*read, *(one.section for one in asked if one.section)]
    said = next((one.samples for one in asked if one.samples), None) or samples()
    page = write_report(subject, sections, said)
    lost = [name for one in asked for name in one.lost]
    if lost:
        raise IncompleteEvaluation(
            f"{page}: written, but without a number for {', '.join(lost[:4])}{' …' if len(lost) > 4 else ''}: too many "
            "scores are missing (the table says how many); where a judge or service did not answer, run it again"
        )
    return page
