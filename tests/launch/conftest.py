"""A finished run of two tiny models, written file by file."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from analysis.report.style import png_bytes
from tests.analysis import asked
from tests.analysis.asked import save_model
from tests.analysis.conftest import CONFIG, dpo_rows, outlines_for_fonts  # noqa: F401

BLANK = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def no_config_left() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn is tested beside the figures; here a tenth of the pixels do, and a PDF with nothing on it."""
    monkeypatch.setattr("analysis.report.style._DPI", 60)
    monkeypatch.setattr(
        "analysis.report.page.save_figure", lambda figure, folder, name: saved(folder, name, png_bytes(figure))
    )


@pytest.fixture
def blank_pictures(small_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not rendered, where another test renders the same ones."""
    monkeypatch.setattr("analysis.report.page.save_figure", lambda figure, folder, name: saved(folder, name, BLANK))


def saved(folder: Path, name: str, picture: bytes) -> list[Path]:
    """The two files of a figure."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(picture)
    (folder / f"{name}.pdf").write_bytes(b"%PDF-1.4\n%%EOF\n")
    return [folder / f"{name}.png", folder / f"{name}.pdf"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "fake" / "2026-01-31_12-00-00"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    pd.DataFrame(dpo_rows()).to_csv(folder / "metrics.csv", index=False)
    pairs = [pair.as_json() for pair in asked.probe_pairs(8)]
    (folder / "probe_prompts.json").write_text(json.dumps(pairs), encoding="utf-8")
    for i, name in enumerate(("base", "aligned")):
        save_model(folder / name, seed=i)
    return folder
