import math
from pathlib import Path

import pytest

from analysis.open.observed import about, row_notes
from analysis.registry import BY_NAME
from tests.analysis import planted_geometry as planted
from tiltmeter.errors import UserError
from tiltmeter.states.snapshots import BASE, SnapshotWriter

STORED = ("cosines", "entropy_controls", "singular_values", "signal_rank", "consistency", "clouds", "preference_plane")


def test_without_snapshots_or_change_there_is_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path / "still"):
        seen = planted.stored(folder)
        if folder.name == "still":
            base = planted.base_states()
            writer = SnapshotWriter(folder / "snapshots", dtype="float32", pair_ids=dict.fromkeys(range(24), "one"))
            writer.write(BASE, base)
            writer.write("epoch=000", base)
        assert [BY_NAME[name].answer(seen) for name in STORED] == [None] * len(STORED)


def test_a_damaged_snapshot_is_named_by_every_section(tmp_path: Path) -> None:
    seen = planted.planted_run(tmp_path)
    (tmp_path / "snapshots" / "epoch=001.safetensors").write_bytes(b"nothing")
    for name in STORED:
        with pytest.raises(UserError, match=r"epoch=001\.safetensors: damaged"):
            BY_NAME[name].answer(seen)


def test_pairs_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    base = planted.base_states()
    policy = planted.moved(base, shift=0.4)
    next(iter(policy.values())).rows[3, 2] = math.nan
    writer = SnapshotWriter(tmp_path / "snapshots", dtype="bfloat16", pair_ids={i: f"pair/{i}" for i in range(24)})
    writer.write(BASE, base)
    writer.write("epoch=000", policy)
    rows = planted.stored(tmp_path).at()
    assert rows is not None
    assert (rows.n_rows, rows.n_left_out) == (23, 1)
    assert "pair/3" not in rows.ids_of(rows.points[0])
    assert [line.split()[0] for line in row_notes(about(rows))] == ["1", "States"]
