"""From a composed configuration to a report, of a run or of any two checkpoints."""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from analysis.behaviour import Answers, Behaviour
from analysis.behaviour_by_step import NAME as BEHAVIOUR_BY_STEP
from analysis.behaviour_by_step import behaviour_by_step_section, behaviour_of_run
from analysis.behaviour_section import NAME as BEHAVIOUR
from analysis.behaviour_section import behaviour_section
from analysis.checkpoints import Checkpoints, HeldOutPairs, checkpoints_of_run
from analysis.hidden_states import SECTIONS, Watched, hidden_state_sections, section_of_run
from analysis.report import Section, write_report
from analysis.runs import Run, find_run, open_run
from analysis.samples import Samples, compare_samples, samples_of
from analysis.steering_section import NAME as STEERING
from analysis.steering_section import steering_section_of
from analysis.steering_sweep import SteeringSweep
from analysis.subject import Subject, subject_of_checkpoints, subject_of_run
from analysis.training_curves import training_section
from launch.configuration import check_config
from launch.screen import console
from launch.steering import report_sweep, sweep_into
from tiltmeter.errors import IncompleteEvaluation, UserError

ALL = "all"
ANALYSES: Mapping[str, Callable[[Run], Section]] = {
    "training": training_section,
    BEHAVIOUR_BY_STEP: behaviour_of_run,
    **{name: partial(section_of_run, name) for name in SECTIONS},
}
"""What is read off the folder of a run; ``analysis=behaviour`` and ``analysis=steering_sweep`` ask the models again."""
_FOR_ASKING: Mapping[str, Sequence[str]] = {
    "behaviour": (BEHAVIOUR,),
    "truthfulqa": (BEHAVIOUR,),
    "steering": (STEERING,),
    **dict.fromkeys(("decoding", "judge", "toxicity"), (BEHAVIOUR, STEERING)),
}
_FOR_CHECKPOINTS = ("data", "pairs", "out")
"""Keys of the configuration and the analyses, or the kind of subject, that they are for."""


def analyze(config: DictConfig) -> Path | None:
    """Open what is asked about, ask, write the report; returns the page, or None for a dry run.

    Nothing is written before all is computed, but for a sweep's table, which a later command goes on with.

    Raises:
        UserError: wrong input.
        IncompleteEvaluation: the report is written, but figures in it have no number, because too many scores are missing.
    """
    check_config(config, config_name="analyze")
    known = (ALL, *ANALYSES, STEERING, BEHAVIOUR)
    if config.analysis not in known:
        raise UserError(f"analysis={config.analysis}: there is none of that name (there are: {', '.join(known)})")
    given = {name for name in ("run", "base", "aligned") if config[name] not in (None, "")}
    if given not in ({"run"}, {"base", "aligned"}):
        raise UserError(
            "run: expected a run folder, for example run=runs/tiny_synthetic/2026-01-31_12-00-00, or run=last; or two checkpoints, "
            f"base=… aligned=… data=…; got {' and '.join(sorted(given)) or 'neither'}"
        )
    _refuse_unused(config)
    if config.run:
        return _analyze_run(config, open_run(find_run(str(config.run), Path(config.runs_root))))
    return _analyze_checkpoints(config)


def _analyze_run(config: DictConfig, run: Run) -> Path | None:
    if config.analysis == STEERING:
        sweep: SteeringSweep = instantiate(config.steering)
        opened = checkpoints_of_run(run, dtype=sweep.dtype, device=sweep.device)
        swept = sweep_into(run.report / "tables", sweep, opened)
        subject = subject_of_run(run, asked_with=_options("run", "steering.restart"))
        return report_sweep(subject, swept, compare_samples(run)) if swept else None
    if config.analysis == BEHAVIOUR:
        asked: Behaviour = instantiate(config.behaviour)
        checkpoints = checkpoints_of_run(run, dtype=asked.dtype, device=asked.device)
        answers = _ask(asked, checkpoints)
        return _report(subject_of_run(run, asked_with=_options("run")), checkpoints, answers)
    if config.analysis == ALL:
        tables = [behaviour_by_step_section(run), steering_section_of(run.report / "tables")]
        scored, steered = ([section] if section else [] for section in tables)
        sections = [training_section(run), *scored, *hidden_state_sections(Watched.of_run(run)), *steered]
    else:
        sections = [ANALYSES[config.analysis](run)]
    return write_report(subject_of_run(run), sections, compare_samples(run))


def _analyze_checkpoints(config: DictConfig) -> Path | None:
    if config.get("data") is None:
        raise UserError("data: expected where prompts come from, got none; add data=hh, data=oasst1 or data=synthetic")
    if config.analysis not in (ALL, BEHAVIOUR, STEERING):
        raise UserError(
            f"analysis={config.analysis}: needs a run; two checkpoints are asked with analysis={BEHAVIOUR} or {STEERING}"
        )
    pairs: HeldOutPairs = instantiate(config.pairs)
    asked: Behaviour | SteeringSweep = instantiate(config.steering if config.analysis == STEERING else config.behaviour)
    base, aligned = str(config.base), str(config.aligned)
    checkpoints, reports, cuts = pairs.ask(
        base, aligned, instantiate(config.data), dtype=asked.dtype, device=asked.device
    )
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path(config.out) if config.out else Path(config.runs_root) / "checkpoints" / stamp / "report"
    options = _options("base", "aligned", "steering.restart")
    subject = subject_of_checkpoints(
        checkpoints, base, aligned, reports=reports, cuts=cuts, options=options, report=folder
    )
    if isinstance(asked, SteeringSweep):
        swept = sweep_into(folder / "tables", asked, checkpoints, goes_on_with=None if config.out else f"out={folder}")
        none = Samples([], f"No samples here; analysis={BEHAVIOUR} shows what both models say.")
        return report_sweep(subject, swept, none) if swept else None
    return _report(subject, checkpoints, _ask(asked, checkpoints))


def _ask(asked: Behaviour, checkpoints: Checkpoints) -> Answers:
    asked.start(checkpoints)
    with console().status("Both models answer, and are scored …"):
        return asked.score(checkpoints)


def _overrides() -> list[str]:
    """What was set on the command line, without Hydra's signs for adding keys."""
    return [text.lstrip("+") for text in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []


def _options(*but: str) -> list[str]:
    """The command line without some of its words, and without the analysis, which each section names itself."""
    return [text for text in _overrides() if text.partition("=")[0] not in (*but, "analysis")]


def _refuse_unused(config: DictConfig) -> None:
    """Refuse what was set on the command line and would have no effect."""
    unused = dict.fromkeys(_FOR_CHECKPOINTS, "two checkpoints, base=… aligned=…") if config.run else {}
    analysis = BEHAVIOUR if config.analysis == ALL and not config.run else config.analysis
    for key, analyses in _FOR_ASKING.items():
        if analysis not in analyses:
            unused[key] = " or ".join(f"analysis={name}" for name in analyses)
    for text in _overrides():
        key = text.lstrip("~").partition("=")[0]
        if (needs := unused.get(key.split(".")[0])) is not None:
            raise UserError(f"{key}: has no effect here; it is for {needs}")


def _report(subject: Subject, checkpoints: Checkpoints, answers: Answers) -> Path:
    """Write it, then say what has no number."""
    samples = samples_of(checkpoints.pairs, answers.samples, answers.decoding)
    page = write_report(subject, [behaviour_section(answers)], samples)
    figures = answers.scores.figures
    lost = [f"{f.name} of {f.of}" for f in figures if f.n_missing and math.isnan(f.value)]
    if lost:
        raise IncompleteEvaluation(
            f"{page}: written, but without a number for {', '.join(lost[:4])}{' …' if len(lost) > 4 else ''}: too many "
            "scores are missing (the table says how many); where a judge or service did not answer, run it again"
        )
    return page
