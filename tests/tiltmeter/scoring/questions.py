"""Questions of TruthfulQA's form, and files that hold them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tiltmeter.scoring import truthfulqa

ROWS: list[dict[str, Any]] = [
    {
        "question": f"Is tea {word} or seven maps?",
        "mc0_targets": {"rain": 1, "kind": 0},
        "mc1_targets": {"blue": 0, "rain": 1, "kind": 0},
        "mc2_targets": {"kind": 0, "rain": 1, "tea": 1, "blue": 0},
    }
    for word in ("rain", "map", "blue", "kind", "seven")
]


PRESET = "Q: Is rain a map?\nA: no"


def write(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def stand_in_preset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in place of the harness's prompt, which is not ours to keep."""
    monkeypatch.setattr(truthfulqa, "PRESET_SHA256", truthfulqa.hashlib.sha256(PRESET.encode()).hexdigest())
    path = folder / "preset.txt"
    path.write_text(PRESET + "\n", encoding="utf-8")
    return path
