import io
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.figures.fig3_consistency import (
    EDGES,
    N_SPLITS,
    OF_PAIRS,
    cosine_tables,
)
from analysis.figures.layer_curves import NULLS, geometry_table
from analysis.open.observations import UPDATE, latest, most_entropy, observed, updates
from analysis.open.observed import Observed, latest_name
from analysis.registry import BY_NAME, sections_of_states
from analysis.report.page import Section
from analysis.report.style import png_bytes
from tests.analysis import planted_geometry as planted
from tests.analysis.asked import OF_STATES
from tests.analysis.conftest import dpo_rows
from tests.analysis.legible import assert_legible
from tiltmeter.geometry.consistency import split_half
from tiltmeter.geometry.rows import row_geometry
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM

SITES = ["layer_00", "layer_01", FINAL_PRE_NORM, FINAL_POST_NORM]


def table_of(rows: list[dict[str, float]]) -> pd.DataFrame:
    return geometry_table(observed(pd.DataFrame(rows)))


def sections_of(rows: list[dict[str, float]], folder: Path) -> dict[str, Section]:
    return {section.name: section for section in sections_of_states(planted.stored(folder, rows))}


def one(name: str, rows: list[dict[str, float]], folder: Path) -> Section:
    section = BY_NAME[name].answer(planted.stored(folder, rows))
    assert section is not None
    return section


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    planted.write_snapshots(folder / "snapshots")
    return folder


@pytest.fixture(scope="module")
def drawn(folder: Path) -> dict[str, Section]:
    return sections_of(planted.run_rows(), folder)


def test_rows_of_several_callbacks_become_one_a_site_in_the_order_of_the_forward_pass() -> None:
    table = observed(pd.DataFrame(planted.run_rows()))
    last = latest(updates(table))
    assert last["site"].tolist() == SITES
    assert set(last["steps_taken"]) == {10}
    assert last[[*UPDATE.values(), *NULLS.values()]].notna().all(axis=None)
    assert not updates(table)["steps_taken"].eq(0).any(), "before the first step there is no update"
    assert set(table["position"]) == {"prompt_last", "diverge"}


def test_the_table_has_what_was_computed_from_the_rows() -> None:
    base = planted.base_states()
    after = planted.moved(base, shift=0.4)
    table = table_of(planted.run_rows())
    assert table["site"].tolist() == SITES
    for row, point in zip(table.itertuples(), base, strict=True):
        update = after[point].rows.double() - base[point].rows.double()
        assert row.shift_share == pytest.approx(row_geometry(update).shift_share, abs=1e-12)
        assert row.top1_energy_centred == pytest.approx(row_geometry(update, "centred").spectrum.top1_energy, abs=1e-12)
        assert row.top1_energy >= row.shift_share - 1e-12


def test_a_run_without_a_probe_has_no_sections_and_no_table(tmp_path: Path) -> None:
    assert table_of(dpo_rows()).empty
    assert sections_of(dpo_rows(), tmp_path) == {}


def test_every_section_is_drawn_and_legible(drawn: dict[str, Section]) -> None:
    assert tuple(drawn) == OF_STATES
    for section in drawn.values():
        panels = [axes for axes in section.figure.axes if axes.get_title("left")]
        assert len(panels) == len(section.sentences)
        assert section.figure.get_size_inches()[0] * 2.54 == pytest.approx(8.0)
        assert len(section.table)
        assert_legible(section)
    more = {table for section in drawn.values() for table in section.more_tables if not table.endswith("_about")}
    assert more == {"spectra", "cloud_distances", "projections", "similarity_map"}
    assert "no entropy can pass ln min(N, d) = ln 16" in " ".join(drawn["entropy"].reading)
    assert "control runs" in " ".join(drawn["geometry"].limits)


def test_sentences_carry_the_numbers_of_the_run(drawn: dict[str, Section]) -> None:
    table = drawn["geometry"].table
    shares = [round(100 * share) for share in table["shift_share"]]
    assert f"One constant shift is {min(shares)}\xa0% (layer 0) to {max(shares)}\xa0%" in drawn["geometry"].sentences[0]
    assert "above its null at 4 of 4 sites" in drawn["geometry"].sentences[-1]
    assert drawn["projection"].sentences[0] == (
        "The projection onto v grows by 0.50 at the final norm’s output (95 % CI +0.30 … +0.70)"
    )
    assert "f grows from" in drawn["layers_by_step"].sentences[0]
    assert "energy entropy falls from" in drawn["layers_by_step"].sentences[1]
    assert all(", outside its null " in sentence for sentence in drawn["cosines"].sentences)


@pytest.mark.parametrize(
    ("delta", "words"), [(-0.5, "falls by 0.50"), (0.1, "changes by +0.10, not distinguishable from 0")]
)
def test_a_fall_is_not_told_as_a_rise(tmp_path: Path, delta: float, words: str) -> None:
    sentence = one("projection", planted.run_rows(delta=delta), tmp_path).sentences[0]
    assert words in sentence


def test_an_update_that_shrinks_is_told_as_such(tmp_path: Path) -> None:
    sentences = one("layers_by_step", planted.run_rows(shifts=(0.4, 0.05)), tmp_path).sentences
    assert "f falls from" in sentences[0]
    assert "energy entropy grows from" in sentences[1]


def test_noise_is_not_above_its_null(tmp_path: Path) -> None:
    planted.write_snapshots(tmp_path / "snapshots", shifts=(0.0,))
    rows = planted.run_rows(shifts=(0.0,))
    match = re.search(r"above its null at (\d) of 4 sites", one("geometry", rows, tmp_path).sentences[-1])
    assert match is not None
    assert int(match[1]) <= 1
    assert ", inside its null " in one("cosines", rows, tmp_path).sentences[1]


def test_a_share_just_short_of_everything_is_not_rounded_up_to_it(tmp_path: Path) -> None:
    sentence = one("geometry", planted.run_rows(shifts=(20.0,)), tmp_path).sentences[0]
    assert "100" not in sentence
    assert "99.9\xa0%" in sentence


def test_one_observation_says_that_it_shows_no_course(tmp_path: Path) -> None:
    section = one("layers_by_step", planted.run_rows(shifts=(0.3,)), tmp_path)
    assert "largest at" in section.sentences[0]
    assert "after 5 steps" in section.sentences[0]
    assert any("no course in time" in line for line in section.reading)


@pytest.mark.parametrize("kept", ["mean_cosine", "shift_share", "projection"])
def test_one_callback_alone_is_enough(tmp_path: Path, kept: str) -> None:
    usual = {"step", "epoch", "probe/steps_taken"}
    families = {kept, "direction_cosine"} if kept == "projection" else {kept}
    rows = [
        {k: v for k, v in row.items() if k in usual or k.split("/")[0] in families} for row in planted.geometry_rows()
    ]
    found = sections_of(dpo_rows() + rows, tmp_path)
    assert set(found) == {"projection"} if kept == "projection" else {"geometry", "layers_by_step"}


def test_one_site_alone_can_be_drawn(tmp_path: Path) -> None:
    rows = [
        {name: value for name, value in row.items() if "/layer_" not in name and FINAL_PRE_NORM not in name}
        for row in planted.run_rows()
    ]
    found = sections_of(rows, tmp_path)
    assert set(found) == {"geometry", "entropy", "layers_by_step", "projection"}
    assert "at the final norm’s output" in found["geometry"].sentences[0]


def test_another_position_is_shown_when_the_usual_one_was_not_read(tmp_path: Path) -> None:
    rows = [
        {
            name
            if "/" not in name or name.startswith(("train", "val", "probe", "proj", "direction_c"))
            else "/".join([*name.split("/")[:-1], "response_last", name.split("/")[-1]]): value
            for name, value in row.items()
        }
        for row in planted.run_rows()
    ]
    section = one("geometry", rows, tmp_path)
    assert set(section.table["position"]) == {"response_last"}
    assert "at response_last" in section.reading[0]


def test_a_deep_model_has_readable_axes(tmp_path: Path) -> None:
    section = one("geometry", planted.run_rows(n_layers=32), tmp_path)
    names = [tick.get_text() for tick in section.figure.axes[-1].get_xticklabels()]
    assert names == ["0", "4", "8", "12", "16", "20", "24", "28", "pre", "\npost"]
    assert len(section.table) == 33


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0, 1e64])
def test_numbers_that_are_not_finite_or_absurd_stop_no_figure(tmp_path: Path, value: float) -> None:
    rows = planted.geometry_rows(n_layers=2, shifts=(0.3,))
    for row in rows[-3:]:
        row |= {name: value for name in row if name.endswith("layer_00")}
    assert "geometry" in sections_of(rows, tmp_path)


def test_the_cap_of_entropies_is_told_from_the_metrics() -> None:
    table = observed(pd.DataFrame(planted.geometry_rows()))
    assert most_entropy(table) == pytest.approx(math.log(min(planted.N_PAIRS, planted.WIDTH)))


@pytest.mark.parametrize("name", OF_STATES)
def test_a_section_is_drawn_again_from_its_files(drawn: dict[str, Section], name: str) -> None:
    """Whatever a figure says stands in the tables of the report: words of the page, and the figure to the last pixel."""
    first = drawn[name]
    tables = {first.name: first.table, **first.more_tables}
    files = {name: io.StringIO(table.to_csv(index=False)) for name, table in tables.items()}
    again = BY_NAME[first.name].section({name: pd.read_csv(file) for name, file in files.items()})
    words = ("question", "claim", "sentences", "interval", "limits", "reading", "headlines")
    assert [getattr(again, part) for part in words] == [getattr(first, part) for part in words]
    assert (again.shown is None) == (first.shown is None)
    assert png_bytes(again.figure) == png_bytes(first.figure)


def test_cosines_are_those_of_the_stored_rows(folder: Path) -> None:
    seen = planted.stored(folder)
    table, here = cosines_of(seen)
    assert (here["snapshot"], here["site"], here["position"]) == ("epoch=001", FINAL_POST_NORM, "prompt_last")
    row = table_of(planted.run_rows()).iloc[-1]
    assert here["in_sample"] == pytest.approx(row.mean_cosine_in_sample, abs=1e-6)
    assert here["leave_one_out"] == pytest.approx(row.mean_cosine_leave_one_out, abs=1e-6)
    assert seen.states is not None
    halves = split_half(seen.states.update(seen.states.points[-1]), n_splits=N_SPLITS)
    assert here["split_half"] == pytest.approx(float(halves.mean_cosine.mean()), abs=1e-9)
    middle = (EDGES[:-1] + EDGES[1:]) / 2
    for side in OF_PAIRS:
        counts = table[f"{side}_pairs"]
        assert counts.sum() == pytest.approx(here["n_rows"])
        mean, low, high = (here[f"{side}{end}"] for end in ("", "_low", "_high"))
        assert float(np.average(middle, weights=counts)) == pytest.approx(mean, abs=0.0125)
        assert low < mean < high
        assert here[f"{side}_null_low"] < here[f"{side}_null_high"] < low
        assert table[f"{side}_null_share"].sum() == pytest.approx(1)


def cosines_of(seen: Observed) -> tuple[pd.DataFrame, pd.Series]:
    tables = cosine_tables(seen)
    assert tables is not None
    return tables["cosines"], tables["cosines_about"].iloc[0]


def test_pairs_that_did_not_move_have_no_cosine_and_leave_the_means_alone() -> None:
    base, update = planted.noise(20, 8), planted.noise(20, 8, 1) + 2
    _, all_moved = cosines_of(planted.of_pair(planted.one_site(base, base + update)))
    base, update = torch.cat([base, base[:5]]), torch.cat([update, 0 * update[:5]])
    table, here = cosines_of(planted.of_pair(planted.one_site(base, base + update)))
    assert (here["n_rows"], here["n_unmoved"]) == (25, 5)
    for side in OF_PAIRS:
        assert table[f"{side}_pairs"].sum() == pytest.approx(20)
        for figure in (side, f"{side}_null_low", f"{side}_null_high"):
            assert here[figure] == pytest.approx(all_moved[figure])


def test_the_latest_snapshot_is_found_whatever_its_name() -> None:
    seen = pd.DataFrame({"epoch": [0, 0, 1, 1], "probe/steps_taken": [0, 10, 15, 20]})
    assert latest_name(["base", "epoch=000", "epoch=001", "step=000015"], seen) == "epoch=001"
    assert latest_name(["base", "epoch=000", "step=000015"], seen) == "step=000015"
    assert latest_name(["base", "something"], seen) is None


def test_rounded_rows_are_said_to_be_rounded(tmp_path: Path) -> None:
    planted.write_snapshots(tmp_path / "snapshots", dtype="bfloat16")
    section = one("cosines", planted.run_rows(), tmp_path)
    assert any("kept as bfloat16" in line for line in section.reading)
