import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis.report.dashboard import SECTIONS, check_spec, main, sections_of
from analysis.report.loggable import loggable_media, loggable_metrics
from callbacks.training_alarms import TrainingAlarms
from lightning_modules.dpo import DPOModule
from tiltmeter.errors import UserError


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("wandb_workspaces", reason="the extra tiltmeter[dashboard] is not installed")
    file = tmp_path_factory.mktemp("dashboard") / "workspace.json"
    assert main(["--entity", "someone", "--project", "tilt", "--dry-run", str(file)]) == 0
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return loaded


def test_the_workspace_opens_on_loss_then_geometry_layers_behaviour_and_samples(spec: dict[str, Any]) -> None:
    assert (spec["entity"], spec["project"]) == ("someone", "tilt")
    names = [name for name, _ in sections_of(spec)]
    assert names == ["Loss, accuracy, margins", "Projection and shift share", "Layers", "Behaviour", "Samples"]
    assert all(panels for _, panels in sections_of(spec))
    _, panels = next(iter(sections_of(spec)))
    assert [panel["config"]["metrics"][0] for panel in panels] == [
        "train/loss",
        "train/rewards/accuracies",
        "train/rewards/margins",
    ]


def test_every_panel_refers_to_names_that_are_logged(spec: dict[str, Any]) -> None:
    check_spec(spec)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metrics": ["train/lost"]}, "nothing logs train/lost"),
        ({"metrics": [], "metricRegex": "^shift_shares/"}, "no logged name matches"),
        ({"mediaKeys": ["figures/nothing"], "metrics": []}, "nothing logs figures/nothing"),
        ({"metrics": []}, "shows nothing"),
    ],
)
def test_a_panel_of_nothing_is_refused(spec: dict[str, Any], change: dict[str, Any], words: str) -> None:
    wrong = copy.deepcopy(spec)
    _, panels = next(iter(sections_of(wrong)))
    panels[0]["config"] |= change
    with pytest.raises(UserError, match=words):
        check_spec(wrong)


def test_names_that_are_listed_by_hand_are_those_of_the_code() -> None:
    names = loggable_metrics()
    assert {f"alarm/{name}" for name in (*TrainingAlarms().limits, "nan")} <= names
    assert {f"{split}/{name}" for split in ("train", "val") for name in DPOModule.columns if "/" in name} <= names
    source = Path(str(sys.modules[DPOModule.__module__].__file__)).parents[1] / "callbacks" / "gradient_geometry.py"
    written = source.read_text(encoding="utf-8")
    for name in (n for n in names if n.startswith("gradient/")):
        assert name in written or name.removeprefix("gradient/energy_along_") in written, name
    assert "figures/geometry" in loggable_media()


def test_without_the_extra_it_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert main(["--dry-run"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("tiltmeter: analysis.report.dashboard: wandb-workspaces is not installed")
    assert "pip install 'tiltmeter[dashboard]'" in line


def test_without_a_login_it_is_one_line(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert main(["--entity", "someone"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "not logged in to W&B" in line


def test_saving_needs_an_entity(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "--entity: expected your W&B user or team" in capsys.readouterr().err


def test_titles_are_unique_within_a_section() -> None:
    for panels in SECTIONS.values():
        assert len({title for title, _ in panels}) == len(panels)
