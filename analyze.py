"""Ask questions of a finished run: ``python analyze.py run=FOLDER``, or ``run=last``; or of any two checkpoints.

``python analyze.py base=HUB_ID_OR_FOLDER aligned=HUB_ID_OR_FOLDER data=hh``. Writes a report/ folder.
"""

import launch.processes.interrupts  # noqa: F401  first, since the others take seconds
import tiltmeter.threads  # noqa: F401  before torch, which reads its threads' settings as it is imported

# isort: split
import hydra
from omegaconf import DictConfig

from launch.analyzing import analyze
from launch.command import one_line_errors, run_command
from launch.screen import console


@hydra.main(config_path="conf", config_name="analyze", version_base="1.3")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_line_errors(config):
        page = analyze(config)
        if page is not None:
            console().print(f"Report: {page}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main, config_name="analyze")
