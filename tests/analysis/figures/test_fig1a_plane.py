from pathlib import Path

import pytest
import torch

from analysis.figures.fig1a_projection import parting
from analysis.open.observed import Observed
from analysis.registry import BY_NAME
from analysis.report.page import Section
from tests.analysis import planted_geometry as planted
from tiltmeter.models.layers import FINAL_POST_NORM
from tiltmeter.states.capture import ReadPoint
from tiltmeter.states.snapshots import BASE, SnapshotWriter
from tiltmeter.states.state_pair import StatePair

N_SITES = 4
LAYER_1 = ReadPoint("layer_01", "prompt_last")


def usable(seen: Observed) -> tuple[StatePair, torch.Tensor, object]:
    found = parting(seen)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    return planted.planted_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def drawn(seen: Observed) -> Section:
    section = BY_NAME["preference_plane"].answer(seen)
    assert section is not None
    return section


def test_projections_are_those_onto_each_pairs_own_v(seen: Observed, drawn: Section) -> None:
    table = drawn.more_tables["projections"]
    assert len(table) == planted.N_PARTING * N_SITES, "pairs that part later have no state here"
    weight = planted.unembedding_weight().double()
    assert seen.states is not None
    for pair in (0, 7, planted.N_PARTING - 1):
        v = weight[2 + pair % 5] - weight[8]
        row = table[(table["pair_id"] == f"pair/{pair}") & (table["site"] == "layer_01")].iloc[0]
        for name, states in zip(("base", "policy"), seen.states.rows(LAYER_1), strict=True):
            assert row[name] == pytest.approx(float(states[pair].double() @ v / v.norm()), abs=1e-6)
        assert row["change"] == pytest.approx(row["policy"] - row["base"], abs=1e-6)
    assert any(f"{planted.N_PARTING} of {planted.N_PAIRS} rows" in line for line in drawn.reading)
    rows, *_ = usable(seen)
    assert rows.clusters_of(LAYER_1)[:3] == ["prompt 0", "prompt 0", "prompt 1"]


def test_the_sentence_tells_the_share_that_grew(seen: Observed, drawn: Section) -> None:
    table = drawn.more_tables["projections"]
    share = (table[table["site"] == FINAL_POST_NORM]["change"] > 0).mean()
    assert f"grew in {100 * share:.0f}\xa0% of the pairs at the final norm" in drawn.sentences[0]
    (said,) = drawn.more_tables["preference_plane_about"].to_dict("records")
    assert 0 < said["energy_v"] + said["energy_pc1"] + said["energy_pc2"] <= 1


def test_states_stored_where_responses_part_are_taken_for_every_pair(tmp_path: Path) -> None:
    base = planted.base_states() | planted.base_states(position="diverge", seed=3)
    writer = SnapshotWriter(
        tmp_path / "snapshots", dtype="float32", pair_ids={i: f"pair/{i}" for i in range(planted.N_PAIRS)}
    )
    writer.write(BASE, base)
    writer.write("epoch=000", planted.moved(base, shift=0.4))
    planted.write_pairs(tmp_path)
    rows, v, _ = usable(planted.stored(tmp_path))
    assert rows.positions == ["diverge"]
    assert len(v) == rows.n_rows == planted.N_PAIRS
    weight = planted.unembedding_weight()
    assert torch.equal(v[-1], weight[9] - weight[8])


def test_without_prompts_or_model_there_is_no_plane_and_pairs_stand_for_prompts(tmp_path: Path) -> None:
    seen = planted.planted_run(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    assert parting(seen) is None
    (tmp_path / "probe_prompts.json").unlink()
    again = planted.stored(tmp_path)
    assert parting(again) is None
    assert again.states is not None
    assert again.states.clusters == again.states.pair_ids
