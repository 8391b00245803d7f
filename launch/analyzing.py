"""From a composed configuration to a report, of a run or of any two checkpoints."""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from analysis.behaviour import NAME as BEHAVIOUR
from analysis.behaviour import Behaviour, behaviour_section
from analysis.behaviour_by_step import NAME as BEHAVIOUR_BY_STEP
from analysis.behaviour_by_step import behaviour_by_step_section, behaviour_of_run
from analysis.checkpoints import Checkpoints, HeldOutPairs, checkpoints_of_run
from analysis.hidden_states import SECTIONS, Watched, hidden_state_sections, section_of_run
from analysis.report import Section, write_report
from analysis.runs import Run, find_run, open_run
from analysis.samples import compare_samples, samples_of
from analysis.subject import subject_of_checkpoints, subject_of_run
from analysis.training_curves import training_section
from launch.configuration import check_config
from launch.screen import console
from tiltmeter.errors import IncompleteEvaluation, UserError
from tiltmeter.scoring.scorer import Figure

ALL = "all"
ANALYSES: Mapping[str, Callable[[Run], Section]] = {
    "training": training_section,
    BEHAVIOUR_BY_STEP: behaviour_of_run,
    **{name: partial(section_of_run, name) for name in SECTIONS},
}
"""What is read off the folder of a run; ``analysis=behaviour`` asks the models again."""


def analyze(config: DictConfig) -> Path:
    """Open what is asked about, ask, write the report; returns the page. Nothing is written before all is computed.

    Raises:
        UserError: wrong input.
        IncompleteEvaluation: the report is written, but figures in it have no number, because too many scores are missing.
    """
    check_config(config, config_name="analyze")
    known = (ALL, *ANALYSES, BEHAVIOUR)
    if config.analysis not in known:
        raise UserError(f"analysis={config.analysis}: there is none of that name (there are: {', '.join(known)})")
    given = {name for name in ("run", "base", "aligned") if config[name] not in (None, "")}
    if given == {"run"}:
        return _analyze_run(config, open_run(find_run(str(config.run), Path(config.runs_root))))
    if given == {"base", "aligned"}:
        return _analyze_checkpoints(config)
    raise UserError(
        "run: expected a run folder, for example run=runs/tiny_synthetic/2026-01-31_12-00-00, or run=last; or two checkpoints, "
        "base=… aligned=… data=…"
    )


def _analyze_run(config: DictConfig, run: Run) -> Path:
    figures: list[Figure] = []
    if config.analysis == BEHAVIOUR:
        asked: Behaviour = instantiate(config.behaviour)
        checkpoints = checkpoints_of_run(run, dtype=asked.dtype, device=asked.device)
        section, figures, _ = _ask(asked, checkpoints)
        sections = [section]
    elif config.analysis == ALL:
        scored = behaviour_by_step_section(run)
        sections = [training_section(run), *([scored] if scored else []), *hidden_state_sections(Watched.of_run(run))]
    else:
        sections = [ANALYSES[config.analysis](run)]
    return _finish(write_report(subject_of_run(run), sections, compare_samples(run)), figures)


def _analyze_checkpoints(config: DictConfig) -> Path:
    if config.get("data") is None:
        raise UserError("data: expected where prompts come from, got none; add data=hh, data=oasst1 or data=synthetic")
    if config.analysis not in (ALL, BEHAVIOUR):
        raise UserError(f"analysis={config.analysis}: needs a run; two checkpoints are asked with analysis={BEHAVIOUR}")
    pairs: HeldOutPairs = instantiate(config.pairs)
    asked: Behaviour = instantiate(config.behaviour)
    base, aligned = str(config.base), str(config.aligned)
    checkpoints, reports = pairs.ask(base, aligned, instantiate(config.data), dtype=asked.dtype, device=asked.device)
    section, figures, samples = _ask(asked, checkpoints)
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path(config.out) if config.out else Path(config.runs_root) / "checkpoints" / stamp / "report"
    data = HydraConfig.get().runtime.choices.get("data") if HydraConfig.initialized() else None
    subject = subject_of_checkpoints(base, aligned, str(data), reports, len(checkpoints.pairs), folder)
    return _finish(write_report(subject, [section], samples_of(checkpoints.pairs, samples)), figures)


def _ask(asked: Behaviour, checkpoints: Checkpoints) -> tuple[Section, list[Figure], Sequence[Any]]:
    asked.start(checkpoints)
    with console().status("Both models answer, and are scored …"):
        samples, scores = asked.score(checkpoints)
    return behaviour_section(samples, scores, asked.decoding), scores.figures, samples


def _finish(page: Path, figures: Sequence[Figure]) -> Path:
    lost = [f"{f.name} of {f.of}" for f in figures if f.n_missing and math.isnan(f.value)]
    if lost:
        raise IncompleteEvaluation(
            f"{page}: written, but without a number for {', '.join(lost[:4])}{' …' if len(lost) > 4 else ''}: too many "
            "scores are missing (the table says how many, the warnings above why); run it again, answers are kept in the cache"
        )
    return page
