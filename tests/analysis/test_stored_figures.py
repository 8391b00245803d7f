import math
from pathlib import Path

import pandas as pd
import pytest

from analysis.hidden_states import Watched, hidden_state_section
from analysis.report import Section
from tests.analysis import planted_geometry as planted
from tiltmeter.errors import UserError
from tiltmeter.snapshots import BASE, SnapshotWriter

STORED = ("entropy_controls", "singular_values", "signal_rank", "consistency", "clouds", "preference_plane")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return planted.watched(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def drawn(seen: Watched) -> dict[str, Section]:
    found = {name: hidden_state_section(name, seen) for name in STORED}
    return {name: section for name, section in found.items() if section is not None}


def test_every_section_has_its_tables_and_a_sentence_a_panel(drawn: dict[str, Section]) -> None:
    assert tuple(drawn) == STORED
    assert {name: set(section.more_tables) for name, section in drawn.items()} == {
        "entropy_controls": set(),
        "singular_values": {"spectra"},
        "signal_rank": set(),
        "consistency": set(),
        "clouds": {"cloud_distances"},
        "preference_plane": {"projections"},
    }
    for section in drawn.values():
        assert len([axes for axes in section.figure.axes if axes.get_title("left")]) == len(section.sentences)


def test_without_snapshots_or_change_there_is_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path / "still"):
        seen = Watched(pd.DataFrame(planted.run_rows()), folder / "snapshots")
        if folder.name == "still":
            base = planted.base_states()
            writer = SnapshotWriter(seen.snapshots, dtype="float32", pair_ids=dict.fromkeys(range(24), "one"))
            writer.write(BASE, base)
            writer.write("epoch=000", base)
        assert [hidden_state_section(name, seen) for name in STORED] == [None] * len(STORED)


def test_a_damaged_snapshot_is_named_by_every_section(tmp_path: Path) -> None:
    seen = planted.watched(tmp_path)
    (seen.snapshots / "epoch=001.safetensors").write_bytes(b"nothing")
    for name in STORED:
        with pytest.raises(UserError, match=r"epoch=001\.safetensors: damaged"):
            hidden_state_section(name, seen)


def test_rows_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    base = planted.base_states()
    policy = planted.moved(base, shift=0.4)
    next(iter(policy.values())).rows[3, 2] = math.nan
    writer = SnapshotWriter(tmp_path / "snapshots", dtype="bfloat16", pair_ids={i: f"pair/{i}" for i in range(24)})
    writer.write(BASE, base)
    writer.write("epoch=000", policy)
    rows = Watched(pd.DataFrame(planted.run_rows()), tmp_path / "snapshots").rows
    assert rows is not None
    assert (rows.n_rows, rows.n_left_out) == (23, 1)
    assert "pair/3" not in rows.pair_ids
    assert [line.split()[0] for line in rows.notes()] == ["1", "Rows"]
