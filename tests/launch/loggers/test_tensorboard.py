"""TensorBoard gets the scalars of metrics.csv under their names, or its absence is one line before anything starts."""

from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from launch.training import train
from tests.cli import composed, logged
from tests.test_bad_input import fails_with
from tests.test_short_runs import SIX_STEPS

SHORT = (*SIX_STEPS, "logger=tensorboard", "trainer.max_steps=2")


def test_without_the_package_the_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.loggers.tensorboard.find_spec", lambda name: None)
    said = fails_with(capsys, tmp_path / "r", *SHORT)
    assert "logger=tensorboard: the package isn't here; pip install tensorboard" in said


@pytest.mark.filterwarnings("ignore")
def test_its_scalars_are_those_of_the_table(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(composed(*SHORT, f"runs_root={tmp_path}"))
    GlobalHydra.instance().clear()
    found = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("train/loss", "train/rewards/margins", "throughput/padding_share"):
        assert [event.value for event in found.Scalars(name)] == pytest.approx(logged(run, name))
    assert [event.step for event in found.Scalars("train/loss")] == [0, 1]
