"""CONTRIBUTING.md: every example runs against the real code, is short, and what it makes works where it is said to."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from analysis.registry import BY_NAME
from analysis.report.style import png_bytes
from datamodules.preference import PreferenceDataModule
from lightning_modules.dpo import DPOModule
from tests import families
from tests.processes import ROOT
from tests.text_samples import figure, samples_of
from tests.tiny_models import fit, lightning_warnings, make_data, make_tokenizer
from tiltmeter.pairs import preference_losses
from tiltmeter.scoring.scorer import Scorer

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
NEW = "sums|questions|random_signs|median_loss"
"""What the examples add: their files aren't there."""


def trains_a_step(_: dict[str, Any], __: pytest.MonkeyPatch) -> None:
    module = DPOModule(loss="exponential", learning_rate=1e-2)
    trainer = fit(module, make_data(4, pairs_per_step=2), family="llama", dtype="float32", max_steps=1)
    assert trainer.callback_metrics["train/loss"] == 1.0  # margins are 0 before the first step


def is_a_section_of_the_report(made: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(metrics=pd.DataFrame({"step": range(12), "train/loss": [1.0] * 9 + [4.0] * 3}))
    section = made["ANALYSIS"].answer(run)
    assert section.sentences == ["The median training loss of nine steps ends at 1.00 nats"]
    assert section.name not in BY_NAME
    assert png_bytes(section.figure)


def is_split_and_tokenised(made: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    data = PreferenceDataModule(made["Sums"](), val_pairs=4, probe_pairs=4, pairs_per_step=2)
    data.load()
    data.tokenize(make_tokenizer())
    assert {name: len(split.pairs) for name, split in data.splits.items()} == {"train": 12, "val": 4, "probe": 4}


def scores_both_models(made: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    scorer = made["Questions"]()
    assert isinstance(scorer, Scorer)
    scores = scorer.score(samples_of(["Why?", "No."], ["Yes.", "No."]))
    assert (figure(scores, "questions").value, figure(scores, "questions", "base").value) == (0.5, 0.0)
    assert scores.columns["questions/policy"] == [1.0, 0.0]


CHECKS: dict[str, Callable[[dict[str, Any], pytest.MonkeyPatch], None]] = {
    "A loss": trains_a_step,
    "A data source": is_split_and_tokenised,
    "A control": lambda made, patch: None,
    "An analysis": is_a_section_of_the_report,
    "A scorer": scores_both_models,
    "A model family": lambda made, patch: None,
}
"""Heading → what is tried beside the example's own assertions."""


def test_the_page_is_one_page_and_every_section_has_a_check() -> None:
    assert list(SECTIONS) == list(CHECKS)
    assert len(PAGE.split()) < 1000


@pytest.mark.parametrize("heading", CHECKS)
def test_a_section_names_files_that_exist_or_that_it_adds(heading: str) -> None:
    named = set(re.findall(r"`((?:[\w]+/)+\w+\.\w+)`", SECTIONS[heading].split("```")[0]))
    assert 1 <= len(named) <= 3
    for path in named:
        assert (ROOT / path).is_file() != bool(re.search(NEW, path)), path


@lightning_warnings
@pytest.mark.parametrize(
    "heading", [pytest.param(x, marks=[pytest.mark.slow] if x == "A model family" else []) for x in CHECKS]
)
def test_an_example_does_what_it_says(heading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference_losses, "PREFERENCE_LOSSES", dict(preference_losses.PREFERENCE_LOSSES))
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[heading], flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    made: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, heading, "exec"), made)
    CHECKS[heading](made, monkeypatch)
