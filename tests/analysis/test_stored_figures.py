import math
from pathlib import Path

import pandas as pd
import pytest

from analysis.figures.hidden_states import Watched
from analysis.registry import BY_NAME
from tests.analysis import planted_geometry as planted
from tiltmeter.errors import UserError
from tiltmeter.states.snapshots import BASE, SnapshotWriter

STORED = ("entropy_controls", "singular_values", "signal_rank", "consistency", "clouds", "preference_plane")


def test_without_snapshots_or_change_there_is_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path / "still"):
        seen = Watched(pd.DataFrame(planted.run_rows()), folder / "snapshots")
        if folder.name == "still":
            base = planted.base_states()
            writer = SnapshotWriter(seen.snapshots, dtype="float32", pair_ids=dict.fromkeys(range(24), "one"))
            writer.write(BASE, base)
            writer.write("epoch=000", base)
        assert [BY_NAME[name].answer(seen) for name in STORED] == [None] * len(STORED)


def test_a_damaged_snapshot_is_named_by_every_section(tmp_path: Path) -> None:
    seen = planted.watched(tmp_path)
    (seen.snapshots / "epoch=001.safetensors").write_bytes(b"nothing")
    for name in STORED:
        with pytest.raises(UserError, match=r"epoch=001\.safetensors: damaged"):
            BY_NAME[name].answer(seen)


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
    assert [line.split()[0] for line in rows.notes()] == ["1", "States"]
