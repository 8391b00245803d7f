"""Agreement of a judge with people, on any labelled data and without a model in between: ``python -m launch.agreement``.

``python -m launch.agreement data=hh data.path=DIR/harmless-base judge=local judge.judge.model=NAME judge.criteria=harmlessness``
"""

import launch.processes.interrupts  # noqa: F401  first, since the others take seconds
import tiltmeter.threads  # noqa: F401  before torch, which reads its threads' settings as it is imported

# isort: split
import math
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from analysis.behaviour.words import is_count, number
from analysis.open.checkpoints import HeldOutPairs
from launch.command import one_line_errors, run_command
from launch.configuration import CONF, check_config, expand_home
from launch.screen import FittingTable, console
from tiltmeter.errors import IncompleteEvaluation, UserError
from tiltmeter.pairs.chat import as_date
from tiltmeter.scoring.scorer import AGREEMENT, Figure, LabelledPair, OfAWorld

_CONCERN = ("data", "judge", "pairs.seed", "chat_date", "runs_root", "debug")
"""Keys of conf/analyze.yaml that have an effect here."""


def agreement_of(config: DictConfig) -> list[Figure]:
    """Ask the judge about so many pairs of the data as its ``agreement_pairs`` says, one a prompt, drawn by ``pairs.seed``.

    Raises:
        UserError: no data, no judge, or keys without an effect.
    """
    expand_home(config)
    check_config(config, config_name="analyze")
    as_date(config.chat_date)
    for text in HydraConfig.get().overrides.task if HydraConfig.initialized() else []:
        key = text.lstrip("~+").partition("=")[0]
        if key not in _CONCERN and key.split(".")[0] not in ("data", "judge"):
            raise UserError(f"{key}: has no effect here; a judge alone is asked with {', '.join(_CONCERN)}")
    if config.get("data") is None:
        raise UserError(
            "data: expected pairs that people ranked, got none; add data=hh or data=preferences data.path=FILE"
        )
    if config.judge is None:
        raise UserError("judge: expected whom to ask, got none; add judge=local judge.judge.model=NAME")
    judge, source = instantiate(config.judge), instantiate(config.data)
    if not judge.agreement.n_pairs:
        raise UserError("judge.agreement_pairs: expected at least 1 pair to ask about, got 0")
    drawn, _ = HeldOutPairs(n_pairs=judge.agreement.n_pairs, seed=config.pairs.get("seed", 0)).draw(source)
    if isinstance(judge, OfAWorld):
        judge.use_world(source)
    judge.use_labels(
        [LabelledPair(p.pair_id, p.prompt_text, p.chosen_text, p.rejected_text, p.group, p.attributes) for p in drawn]
    )
    judge.agreement.start()
    found: list[Figure] = judge.agreement.figures()
    return found


def agreement_table(figures: Sequence[Figure]) -> FittingTable:
    """A line a figure, the judge below."""
    options: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "caption_justify": "left"}
    table = FittingTable(title="The judge against people’s labels", caption=figures[0].scorer, **options)
    for heading in ("figure", "value", "95 % interval", "n", "missing"):
        table.add_column(heading, justify="left" if heading == "figure" else "right", no_wrap=True)
    for figure in figures:
        ends = f"{number(figure.low)} … {number(figure.high)}" if math.isfinite(figure.low) else "–"
        shown = "–" if is_count(figure.name) else ends
        table.add_row(figure.name, number(figure.value, figure.name), shown, str(figure.n), str(figure.n_missing))
    return table


@hydra.main(config_path=str(CONF), config_name="analyze", version_base="1.3")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_line_errors(config):
        figures = agreement_of(config)
        console().print(agreement_table(figures))
        if any(figure.name == AGREEMENT and math.isnan(figure.value) for figure in figures):
            raise IncompleteEvaluation(f"{AGREEMENT}: without a number, too many answers are missing; run it again")


if __name__ == "__main__":
    run_command(main, config_name="analyze")
