"""``python analyze.py`` in this process."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from launch.analyzing import analyze
from launch.config_keys import config_key
from launch.configuration import CONF, prepare_overrides
from tests.processes import contents
from tiltmeter.errors import UserError, arguments_shown


def composed(*arguments: str) -> DictConfig:
    """The configuration of a command line, as Hydra would make it."""
    overrides = prepare_overrides(arguments, config_name="analyze")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("analyze", overrides=overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def ask(tmp_path: Path, *arguments: str) -> Path | None:
    """As ``analyze.py`` does, in this process."""
    return ask_exactly(*arguments, f"runs_root={tmp_path / 'runs'}")


def ask_exactly(*arguments: str) -> Path | None:
    """As ``analyze.py`` does, in this process, with these arguments alone."""
    config = composed(*arguments)
    with arguments_shown(lambda name: config_key(name, config)):
        return analyze(config)


def refused(tmp_path: Path, *arguments: str) -> str:
    before = contents(tmp_path)
    with pytest.raises((UserError, SystemExit)) as caught:
        ask(tmp_path, *arguments)
    assert contents(tmp_path) == before, "something was written"
    assert "\n" not in str(caught.value)
    return str(caught.value)
