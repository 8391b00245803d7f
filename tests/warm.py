"""Imported by the process that runs are forked from: what every run does first is done there once.

Files of conf/ are parsed, and Hydra's and OmegaConf's parsers, which learn as they read, have read a command line.
"""

import matplotlib.backends.backend_pdf  # noqa: F401  which brings the one for PNG
import wandb.sdk.launch  # noqa: F401  imported when a run begins
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from launch.configuration import CONF, check_config, prepare_overrides
from tests.parsed_once import keep_parsed_files
from tiltmeter.scoring.toxicity import WordListToxicity

COMMAND = ("data.n_prompts=120", "callbacks=full", "decoding.temperature=0.8", "datamodule.val_pairs=20", "logger=csv")

Image.preinit()
WordListToxicity().start()  # a large pattern, which re keeps
keep_parsed_files()
_overrides = prepare_overrides(COMMAND, config_name="train")
with initialize_config_dir(str(CONF), version_base="1.3"):
    check_config(compose("train", overrides=_overrides))
    compose("analyze", return_hydra_config=True)
GlobalHydra.instance().clear()
