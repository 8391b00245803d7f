import math

import numpy as np
import pytest
import torch

from analysis.figures.fig3_consistency import (
    N_SPLITS,
    OF_PAIRS,
    consistency_row,
    consistency_tables,
    expected_between_halves,
)
from analysis.open.observed import Observed
from analysis.registry import BY_NAME
from tests.analysis import planted_geometry as planted
from tests.analysis.planted_geometry import POINT, noise, one_site
from tiltmeter.geometry.consistency import leave_one_out_cosines, split_half
from tiltmeter.geometry.rows import row_geometry


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    return planted.planted_run(tmp_path_factory.mktemp("run"))


def test_consistency_is_that_of_the_rows(seen: Observed) -> None:
    tables = consistency_tables(seen)
    assert tables is not None
    assert seen.states is not None
    table = tables["consistency"].set_index("site")
    for point in seen.states.points:
        update = seen.states.update(point)
        row = table.loc[point.site]
        assert row["leave_one_out"] == pytest.approx(float(leave_one_out_cosines(update).mean()), abs=1e-9)
        assert row["split_half"] == pytest.approx(
            float(split_half(update, n_splits=N_SPLITS).mean_cosine.mean()), abs=1e-9
        )
        for measure in OF_PAIRS:
            assert row[f"{measure}_low"] < row[measure] < row[f"{measure}_high"]
            assert row[f"{measure}_null_low"] < row[f"{measure}_null_high"] < row[measure]
        assert row["split_half_least"] <= row["split_half"]


def test_all_three_cosines_are_drawn_over_their_own_nulls(seen: Observed) -> None:
    section = BY_NAME["consistency"].answer(seen)
    assert section is not None
    table = section.table
    for axes, measure in zip(section.figure.axes[1:], ("split_half", "leave_one_out", "in_sample"), strict=True):
        assert axes.get_title("left").startswith(OF_PAIRS[measure])
        assert "above its null at 4 of 4 sites" in " ".join(axes.get_title("left").split())
        band, interval = axes.collections[0], axes.collections[2]  # each: the residual stream, then the final norm
        for drawn, name in ((band, f"{measure}_null"), (interval, measure)):
            heights = drawn.get_paths()[0].vertices[:, 1]  # type: ignore[attr-defined]
            assert heights.max() == pytest.approx(table[f"{name}_high"][:-1].max())
            assert heights.min() == pytest.approx(table[f"{name}_low"][:-1].min())


def test_how_well_halves_agree_follows_from_f_and_n_when_rows_are_a_shift_plus_noise() -> None:
    found = []
    for seed in range(30):
        rows = noise(80, 400, seed)
        rows[:, 0] += 4
        share = row_geometry(rows).shift_share
        between = float(split_half(rows, n_splits=5, seed=seed).cosine_of_means.mean())
        found.append(between - expected_between_halves(share, 80))
    assert abs(float(np.mean(found))) < 0.01
    assert math.isnan(expected_between_halves(0.001, 80))


def test_rows_that_did_not_change_are_counted_and_left_out() -> None:
    base = noise(20, 8)
    update = torch.ones(20, 8, dtype=torch.float64)
    update[:5] = 0
    row = consistency_row(one_site(base, base + update), POINT)
    assert row["n_unmoved"] == 5
    assert row["split_half"] == pytest.approx(1)
