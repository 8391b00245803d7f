"""The registry against conf/analyze.yaml: nodes build what an analysis asks with, and keys are there."""

import pytest
from omegaconf import OmegaConf

from analysis.contract import Analysis
from analysis.registry import ANALYSES, BY_NAME
from launch.configuration import CONF

CONFIG = OmegaConf.load(CONF / "analyze.yaml")
GROUPS = {key for default in CONFIG.defaults if not isinstance(default, str) for key in default}


def test_every_analysis_has_a_name_of_its_own() -> None:
    assert len(BY_NAME) == len(ANALYSES)
    assert "all" not in BY_NAME


@pytest.mark.parametrize("analysis", ANALYSES, ids=list(BY_NAME))
def test_keys_of_an_analysis_are_in_the_configuration(analysis: Analysis) -> None:
    assert set(analysis.keys) <= {*CONFIG, *GROUPS}
    assert (analysis.needs.what == "models") == (analysis.node in CONFIG)
    assert bool(analysis.keys) == (analysis.needs.what != "run")


def test_only_hidden_states_are_held_against_random_weights_or_drawn_while_training() -> None:
    special = [a for a in ANALYSES if a.needs.random_weights or a.needs.several_steps or a.while_training]
    assert {a.needs.what for a in special} == {"states"}


def test_an_analysis_without_a_table_has_no_section() -> None:
    analysis = Analysis(
        "none", BY_NAME["training"].needs, table=lambda run: None, section=lambda table: pytest.fail("drawn")
    )
    assert analysis.answer(None) is None
