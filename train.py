"""Train a language model with DPO: ``python train.py experiment=NAME``; everything is in conf/."""

import launch.processes.interrupts  # noqa: F401  first, since the others take seconds
import tiltmeter.threads  # noqa: F401  before torch, which reads its threads' settings as it is imported

# isort: split
import hydra
from omegaconf import DictConfig

from launch.command import run_command
from launch.training import train


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    train(config)


if __name__ == "__main__":
    run_command(main, config_name="train")
