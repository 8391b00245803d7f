"""A data source of one's own, as docs/data.md shows it, and what is said of one that can't be used."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.utils import instantiate

from datamodules.preference import PreferenceDataModule
from launch.configuration import check_config, prepare_overrides
from tests.cli import composed
from tests.datamodules.preference_examples import DOC
from tiltmeter.errors import UserError

OWN = ("data=own", "data._target_=my_source.Sums")


@pytest.fixture(autouse=True)
def my_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module of the documentation, with a class that is no source behind it."""
    (code,) = re.findall(r"```python\n(# my_source\.py\n.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_source.py").write_text(f"{code}\nclass Other:\n    pass\n\nnumber = 3\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_source", None)


def test_the_documented_source_is_read_with_its_options() -> None:
    config = composed(*OWN, "data.n=40", "judge=none")
    check_config(config)
    data = PreferenceDataModule(instantiate(config.data), val_pairs=10, probe_pairs=5)
    data.load()
    assert {name: len(pairs) for name, pairs in data.records.items()} == {"train": 25, "val": 10, "probe": 5}
    assert data.records["train"][0].prompt_text.endswith("=\n\nAssistant:")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data._target_=my_sorce.Sums", "data.n=4"], "my_sorce.Sums: there is no such class (No module named 'my_sorce')"),
        (["data._target_=my_source.Sum", "data.n=4"], "there is no such class (module 'my_source' has no attribute 'Sum')"),
        (["data._target_=my_source.number", "data.n=4"], "_target_=my_source.number: expected a class, got int"),
        (["data._target_=my_source.Sums", "data.m=4"], "data.m: unknown configuration key"),
    ],
)  # fmt: skip
def test_a_misspelt_class_or_option_is_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare_overrides(["data=own", *arguments], config_name="train")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [["data._target_=my_sorce.Sums"], []])
def test_a_misspelt_or_missing_class_without_options_is_one_line(arguments: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"data\._target_: expected a value|_target_=my_sorce.Sums: there is no such class"
    ):
        check_config(composed("data=own", *arguments))


def test_a_class_that_is_no_source_is_refused() -> None:
    config = composed("data=own", "data._target_=my_source.Other")
    with pytest.raises(UserError, match=r"data: Other is no source of preferences, it has no load\(\)"):
        PreferenceDataModule(instantiate(config.data)).load()
