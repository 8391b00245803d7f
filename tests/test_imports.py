"""The import rule of the house: tiltmeter ← datamodules ← {lightning_modules, callbacks, analysis} ← launch ← train.py."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("tiltmeter", "datamodules", "lightning_modules", "callbacks", "analysis", "launch")
MAY_IMPORT = {
    "tiltmeter": set(),
    "datamodules": {"tiltmeter"},
    "lightning_modules": {"tiltmeter", "datamodules"},
    "callbacks": {"tiltmeter", "datamodules"},
    "analysis": {"tiltmeter", "datamodules"},
    "launch": {"tiltmeter", "datamodules", "lightning_modules", "callbacks", "analysis"},
}
NEVER_IN_TILTMETER = {"lightning", "hydra", "wandb"}


def imported_roots(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        wrong = (imported_roots(file) & set(PACKAGES)) - MAY_IMPORT[package] - {package}
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_science_knows_no_trainer_config_or_tracker() -> None:
    for file in (ROOT / "tiltmeter").rglob("*.py"):
        wrong = imported_roots(file) & NEVER_IN_TILTMETER
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("name", ["train.py", "analyze.py"])
def test_entry_points_stay_thin(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 60


def test_callbacks_stay_thin() -> None:
    for file in (ROOT / "callbacks").rglob("*.py"):
        if file.name in ("probe_session.py", "scoring.py"):  # what callbacks share, no callback
            continue
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 80, file.name
