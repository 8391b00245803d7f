import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from analysis.clouds import cloud_fit, cloud_plane
from analysis.consistency_by_site import consistency_table, expected_between_halves
from analysis.hidden_states import Watched, hidden_state_section
from analysis.preference_plane import plane_points
from analysis.report import Section
from analysis.singular_values import scree, spectra_table
from analysis.stored_head import unembedding_rows
from analysis.stored_rows import StoredRows
from tests.analysis import planted_geometry as planted
from tiltmeter.consistency import leave_one_out_cosines, split_half
from tiltmeter.errors import UserError
from tiltmeter.geometry import in_own_span, row_geometry
from tiltmeter.layers import FINAL_POST_NORM, FINAL_PRE_NORM
from tiltmeter.snapshots import BASE, SnapshotWriter

SITES = ["layer_00", "layer_01", FINAL_PRE_NORM, FINAL_POST_NORM]
STORED = ("singular_values", "consistency", "clouds", "preference_plane")


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored(base: Tensor, policy: Tensor, clusters: list[str] | None = None) -> StoredRows:
    """One site of planted rows."""
    ids = [str(i) for i in range(len(base))]
    at = {FINAL_POST_NORM: base}, {FINAL_POST_NORM: policy}
    return StoredRows("epoch=000", "prompt_last", "float32", ids, clusters or ids, *at, 0)


def seen_of(folder: Path, **options: object) -> Watched:
    planted.write_snapshots(folder / "snapshots", **options)  # type: ignore[arg-type]
    return Watched(pd.DataFrame(planted.run_rows()), folder / "snapshots")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return seen_of(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def drawn(seen: Watched) -> dict[str, Section]:
    found = {name: hidden_state_section(name, seen) for name in STORED}
    return {name: section for name, section in found.items() if section is not None}


def test_every_section_has_its_tables_and_says_what_it_does_not_show(drawn: dict[str, Section]) -> None:
    assert tuple(drawn) == STORED
    assert {name: set(section.more_tables) for name, section in drawn.items()} == {
        "singular_values": {"spectra"},
        "consistency": set(),
        "clouds": {"cloud_distances"},
        "preference_plane": {"projections"},
    }
    for section in drawn.values():
        assert len([axes for axes in section.figure.axes if axes.get_title("left")]) == len(section.sentences)
        assert any(line.startswith("Not shown: ") for line in section.reading), section.name


def test_spectra_are_those_of_the_stored_rows_under_every_control(seen: Watched) -> None:
    assert seen.rows is not None
    table = spectra_table(seen.rows)
    assert len(table) == len(SITES) * 3 * 4
    where = (table["site"] == "layer_01") & (table["matrix"] == "policy") & (table["variant"] == "unit_row")
    (row,) = table[where].to_dict("records")
    sigma = torch.linalg.svdvals(torch.nn.functional.normalize(seen.rows.policy["layer_01"].double(), dim=1))
    assert [row[f"sigma_{k + 1}"] for k in range(5)] == pytest.approx(sigma[:5].tolist(), rel=1e-6)
    assert row["sigma_ratio"] == pytest.approx(float(sigma[1] / sigma[0]), rel=1e-6)
    assert (table["top1_energy"] >= table["shift_share"] - 1e-12).all()


def test_noise_with_a_shift_is_of_rank_one_raw_and_of_no_rank_centred() -> None:
    base = noise(100, 60)
    rows = stored(base, base + 0.1 * noise(100, 60, 1) + 1)
    found = scree(rows, FINAL_POST_NORM)
    assert found is not None
    assert float(found.table["raw"][1]) < 0.1
    assert found.n_above_null <= 1
    assert found.n_above_edge <= 2
    update = spectra_table(rows)[lambda t: t["matrix"] == "update"].set_index("variant")
    assert update.loc["raw", "signal_rank"] - update.loc["centred", "signal_rank"] == 1
    assert update.loc["centred", "sigma_ratio"] > 0.9
    assert update.loc["raw", "cos_top_mean"] > 0.999
    assert math.isnan(update.loc["centred", "cos_top_mean"])


def test_two_more_directions_are_found_above_both_nulls() -> None:
    base, spikes = noise(120, 60), 4 * noise(120, 2, 3) @ torch.linalg.qr(noise(60, 2, 4)).Q.T
    found = scree(stored(base, base + noise(120, 60, 1) + spikes + 3), FINAL_POST_NORM)
    assert found is not None
    assert found.n_above_null == 2
    assert found.n_above_edge in (2, 3)


def test_consistency_is_that_of_the_rows(seen: Watched) -> None:
    assert seen.rows is not None
    table = consistency_table(seen.rows).set_index("site")
    for site in SITES:
        update = seen.rows.update(site)
        row = table.loc[site]
        assert row["leave_one_out"] == pytest.approx(float(leave_one_out_cosines(update).mean()), abs=1e-9)
        assert row["split_half"] == pytest.approx(float(split_half(update, n_splits=100).mean_cosine.mean()), abs=1e-9)
        assert row["leave_one_out_low"] <= row["leave_one_out"] <= row["leave_one_out_high"]
        assert row["split_half_least"] <= row["split_half"]
        assert row["split_half"] > row["split_half_null_high"]


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
    (row,) = consistency_table(stored(base, base + update)).to_dict("records")
    assert row["n_unmoved"] == 5
    assert row["split_half"] == pytest.approx(1)


@pytest.mark.parametrize(("noise_size", "least", "most"), [(0.0, -1e-9, 1e-9), (0.3, -0.02, 0.2)])
def test_a_constant_shift_leaves_nothing_between_the_clouds(noise_size: float, least: float, most: float) -> None:
    base = noise(40, 10)
    fit = cloud_fit(stored(base, base + 1 + noise_size * noise(40, 10, 1)), FINAL_POST_NORM, n_random=5)
    assert least <= fit.left.value <= most
    assert fit.left_random[0] > 0.9
    assert fit.left_per_pair[0] == pytest.approx(0.3 if noise_size else 0, abs=0.05)
    assert fit.shift_share.value == pytest.approx(1 / (1 + noise_size**2), abs=0.03)


def test_a_change_of_scale_is_no_shift() -> None:
    base = noise(60, 5)
    fit = cloud_fit(stored(base, 3 * base), FINAL_POST_NORM, n_random=0)
    assert fit.left.low <= 1.3
    assert fit.left.value > 0.7
    assert fit.shift_share.value < 0.1
    assert all(math.isnan(x) for x in fit.left_random)


def test_v_is_never_taken_from_the_cloud_it_is_tried_on() -> None:
    """Changes of one scale without a common shift: v* of the same rows would bring the means together, that of others can't."""
    left = []
    for seed in range(10):
        base = noise(16, 60, seed)
        rows = stored(base, base + 2 * noise(16, 60, 100 + seed))
        left.append(cloud_fit(rows, FINAL_POST_NORM, n_random=0).left.value)
    assert float(np.mean(left)) > 1


def test_a_wide_model_is_measured_as_in_all_its_dimensions() -> None:
    """Rows are taken to their own span first; here in more dimensions than rows, beside the same rows padded with zeros."""
    base, update = noise(12, 6), noise(12, 6, 1) + 1
    wide = [torch.cat([x, torch.zeros(12, 40, dtype=torch.float64)], 1) for x in (base, base + update)]
    narrow = cloud_fit(stored(base, base + update), FINAL_POST_NORM, n_random=0)
    found = cloud_fit(stored(*wide), FINAL_POST_NORM, n_random=0)
    assert found.left.value == pytest.approx(narrow.left.value, abs=1e-9)
    assert found.base_distance == pytest.approx(narrow.base_distance, abs=1e-9)
    assert torch.allclose(in_own_span(wide[0]) @ in_own_span(wide[0]).T, base @ base.T)


def test_clouds_are_translates_and_the_plane_is_that_of_both_models() -> None:
    base = noise(30, 6)
    rows = stored(base, base + 2 + 0.1 * noise(30, 6, 1))
    table = cloud_plane(rows, FINAL_POST_NORM).table.pivot(index="pair_id", columns="cloud", values=["pc1", "pc2"])
    for axis in ("pc1", "pc2"):
        at = table[axis]
        assert np.ptp(at["base_plus"] - at["base"]) == pytest.approx(0, abs=1e-9)
        assert np.allclose(at["base_plus"] + at["base_minus"], 2 * at["base"])
        assert float((at["base"] + at["policy"]).mean()) == pytest.approx(0, abs=1e-9)
        assert float(at["base_plus"].mean()) == pytest.approx(float(at["policy"].mean()), abs=1e-9)


def test_projections_are_those_onto_each_pairs_own_v(seen: Watched, drawn: dict[str, Section]) -> None:
    table = drawn["preference_plane"].more_tables["projections"]
    assert len(table) == planted.N_PARTING * len(SITES), "pairs that part later have no state here"
    weight = planted.unembedding_weight().double()
    assert seen.rows is not None
    for pair in (0, 7, planted.N_PARTING - 1):
        v = weight[2 + pair % 5] - weight[8]
        row = table[(table["pair_id"] == f"pair/{pair}") & (table["site"] == "layer_01")].iloc[0]
        for name, states in (("base", seen.rows.base), ("policy", seen.rows.policy)):
            assert row[name] == pytest.approx(float(states["layer_01"][pair].double() @ v / v.norm()), abs=1e-6)
        assert row["change"] == pytest.approx(row["policy"] - row["base"], abs=1e-6)
    assert any(f"{planted.N_PARTING} of {planted.N_PAIRS} rows" in line for line in drawn["preference_plane"].reading)
    assert seen.parting is not None
    assert seen.parting.clusters[:3] == ["prompt 0", "prompt 0", "prompt 1"]


def test_the_sentence_tells_the_share_that_grew(seen: Watched, drawn: dict[str, Section]) -> None:
    table = drawn["preference_plane"].more_tables["projections"]
    share = (table[table["site"] == FINAL_POST_NORM]["change"] > 0).mean()
    assert f"grew in {100 * share:.0f}\xa0% of the pairs at the final norm" in drawn["preference_plane"].sentences[0]
    assert seen.parting is not None
    shares = plane_points(seen.parting, FINAL_POST_NORM).energy_shares
    assert 0 < sum(shares) <= 1


def test_states_stored_where_responses_part_are_taken_for_every_pair(tmp_path: Path) -> None:
    base = planted.base_states() | planted.base_states(position="diverge", seed=3)
    writer = SnapshotWriter(
        tmp_path / "snapshots", dtype="float32", pair_ids={i: f"pair/{i}" for i in range(planted.N_PAIRS)}
    )
    writer.write(BASE, base)
    writer.write("epoch=000", planted.moved(base, shift=0.4))
    planted.write_pairs(tmp_path)
    parting = Watched(pd.DataFrame(planted.run_rows()), tmp_path / "snapshots").parting
    assert parting is not None
    assert parting.rows.position == "diverge"
    assert len(parting.kept) == planted.N_PAIRS
    weight = planted.unembedding_weight()
    assert torch.equal(parting.v[-1], weight[9] - weight[8])


def test_without_prompts_or_model_there_is_no_plane_and_pairs_stand_for_prompts(tmp_path: Path) -> None:
    seen = seen_of(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    assert seen.parting is None
    (tmp_path / "probe_prompts.json").unlink()
    again = Watched(seen.metrics, seen.snapshots)
    assert again.parting is None
    assert again.rows is not None
    assert again.rows.clusters == again.rows.pair_ids


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
    seen = seen_of(tmp_path)
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


def test_an_unembedding_is_read_from_one_file_or_several_or_not_at_all(tmp_path: Path) -> None:
    weight = planted.unembedding_weight().bfloat16()
    save_file({"model.embed_tokens.weight": weight, "other": weight + 1}, tmp_path / "model.safetensors")
    found = unembedding_rows(tmp_path, [3, 1, 3])
    assert found is not None
    assert found.dtype == torch.float32
    assert torch.equal(found, weight[[3, 1, 3]].float())
    parts = tmp_path / "parts"
    parts.mkdir()
    assert unembedding_rows(parts, [1]) is None
    save_file({"lm_head.weight": weight}, parts / "model-2.safetensors")
    places = {"model.embed_tokens.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = unembedding_rows(parts, [2])
    assert found is not None
    assert torch.equal(found, weight[2:3].float())
    save_file({"strange": weight}, tmp_path / "model.safetensors")
    assert unembedding_rows(tmp_path, [1]) is None


def test_an_unembedding_that_is_damaged_or_of_another_model_is_named(tmp_path: Path) -> None:
    save_file({"lm_head.weight": planted.unembedding_weight()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: has 10 tokens, so no token 10"):
        unembedding_rows(tmp_path, [10])
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        unembedding_rows(tmp_path, [1])
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index\.json: damaged"):
        unembedding_rows(tmp_path, [1])
