import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from analysis.claims.claim import ARMS
from analysis.report.dashboard import SECTIONS, build_workspace, main, spec_of
from analysis.report.style import COLOURS
from tiltmeter.metric_names import METRICS, at
from tiltmeter.models.layers import all_sites

KEYS = [key for metric in METRICS if metric.position for key in metric.keys]


def sections_of(spec: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Name and panels of each section, in order."""
    return [(s["name"], s["panels"]) for s in spec["spec"]["section"]["panelBankConfig"]["sections"]]


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


def test_every_pattern_matches_metrics_at_every_site_of_one_position_alone() -> None:
    """W&B joins what a pattern matches into one panel."""
    names = {at(key, (site, p)): p for key in KEYS for site in all_sites(3) for p in ("prompt_last", "content")}
    patterns = {title: what for panels in SECTIONS.values() for title, what in panels if isinstance(what, str)}
    matched = {title: [name for name in names if re.search(pattern, name)] for title, pattern in patterns.items()}
    assert all(len({names[name] for name in found}) == 1 for found in matched.values()), matched
    f = matched["Shift share f at every site"]
    assert f == [at("shift_share/delta", (site, "prompt_last")) for site in all_sites(3)]


def test_pictures_tables_and_curves_each_get_their_kind_of_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(name: str) -> Callable[..., Any]:
        return lambda **options: SimpleNamespace(kind=name, **options)

    kinds = ("LinePlot", "WeavePanelSummaryTable", "MediaBrowser")
    panels = SimpleNamespace(**{name: kind(name) for name in kinds})
    workspaces = SimpleNamespace(**{name: kind(name) for name in ("SectionLayoutSettings", "Section", "Workspace")})
    monkeypatch.setitem(sys.modules, "wandb_workspaces.expr", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", workspaces)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", panels)
    built = {section.name: [panel.kind for panel in section.panels] for section in build_workspace("a", "b").sections}
    assert built["Samples"] == ["WeavePanelSummaryTable"]
    assert built["Layers"] == [*["MediaBrowser"] * 5, "LinePlot"]
    assert {*built["Behaviour"], *built["Loss, accuracy, margins"]} == {"LinePlot"}


def test_study_opens_on_its_verdicts_with_its_arms_in_their_colours() -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra tiltmeter[dashboard] is not installed")
    spec = spec_of(build_workspace("someone", "tilt", study="study_a"))
    assert spec["name"] == "tiltmeter study_a"
    (name, panels), *rest = sections_of(spec)
    assert name == "Verdicts"
    assert [section for section, _ in rest] == list(SECTIONS)
    assert [panel["viewType"] for panel in panels] == ["Weave", "Media Browser", "Media Browser"]
    (runs,) = spec["spec"]["section"]["runSets"]
    assert runs["grouping"] == [{"section": "config", "name": "arm.value"}]
    assert runs["filters"]["filters"][0]["value"] == "study_a"
    text = json.dumps(spec)
    assert len({COLOURS[arm] for arm in ARMS}) == len(ARMS), "no two arms look alike"
    assert all(COLOURS[arm] in text for arm in ARMS)


def test_folder_that_is_no_study_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--study", str(tmp_path)]) == 2
    assert "has no study.yaml, so it is no study" in capsys.readouterr().err


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
