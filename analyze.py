"""Ask questions of a finished run: ``python analyze.py run=FOLDER``, or ``run=last``; writes its report/ folder."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from analysis.hidden_states import SECTIONS, Watched, hidden_state_sections, section_of_run
from analysis.report import Section, write_report
from analysis.runs import Run, find_run, open_run
from analysis.samples import compare_samples
from analysis.training_curves import training_section
from launch.command import one_line_errors, run_command
from launch.configuration import check_config
from launch.screen import console
from tiltmeter.errors import UserError

ALL = "all"
ANALYSES: Mapping[str, Callable[[Run], Section]] = {
    "training": training_section,
    **{name: partial(section_of_run, name) for name in SECTIONS},
}


@hydra.main(config_path="conf", config_name="analyze", version_base="1.3")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_line_errors(debug=config.debug):
        page = analyze(config)
        console().print(f"Report: {page}", soft_wrap=True, markup=False)


def analyze(config: DictConfig) -> Path:
    """Open the run, ask the question, write the report; returns the page. Nothing is written before all is computed."""
    if OmegaConf.is_missing(config, "run") or config.run in (None, ""):
        raise UserError(
            "run: expected a run folder, for example run=runs/tiny_synthetic/2026-01-31_12-00-00, or run=last"
        )
    check_config(config, config_name="analyze")
    if config.analysis != ALL and config.analysis not in ANALYSES:
        known = ", ".join((ALL, *ANALYSES))
        raise UserError(f"analysis={config.analysis}: there is none of that name (there are: {known})")
    run = open_run(find_run(str(config.run), Path(config.runs_root)))
    if config.analysis == ALL:
        sections = [training_section(run), *hidden_state_sections(Watched.of_run(run))]
    else:
        sections = [ANALYSES[config.analysis](run)]
    return write_report(run, sections, compare_samples(run))


if __name__ == "__main__":
    run_command(main, config_name="analyze")
