from pathlib import Path

import pytest
import torch

from analysis.belief.similarity import similarity_tables
from analysis.claims.claim import make_claims
from analysis.registry import BY_NAME
from tests.analysis import planted_geometry as planted
from tests.analysis.planted_geometry import POINT, noise, of_pair, one_site
from tiltmeter.geometry.similarity import linear_cka, mutual_knn, one_row_a_prompt, without_shift


def test_the_table_is_that_of_the_rows_and_the_map_has_every_pair_of_sites(tmp_path: Path) -> None:
    seen = planted.planted_run(tmp_path)
    tables = similarity_tables(seen)
    assert tables is not None
    assert seen.states is not None
    table = tables["similarity"].set_index("site")
    for point in seen.states.points:
        clusters = seen.states.clusters_of(point)
        base, policy = (one_row_a_prompt(rows, clusters) for rows in seen.states.rows(point))
        row = table.loc[point.site]
        assert row["n_prompts"] == planted.N_PAIRS // 2
        assert row["cka"] == pytest.approx(linear_cka(base, policy), abs=1e-9)
        assert row["knn"] == mutual_knn(base, policy, k=10).interval.value
        assert row["knn_without_shift"] == mutual_knn(base, without_shift(base, policy), k=10).interval.value
        assert row["cka_low"] < row["cka"] < row["cka_high"]
    n = len(seen.states.points)
    cells = tables["similarity_map"]
    assert len(cells) == n * n
    own = cells[cells["base_site"] == cells["policy_site"]].set_index("policy_site")["cka"]
    assert own.to_dict() == pytest.approx(table["cka"].to_dict(), abs=1e-5)
    section = BY_NAME["similarity"].answer(seen)
    assert section is not None
    assert "CKA of base and policy is" in section.sentences[0]


def test_one_shift_of_all_states_is_seen_by_displacement_and_neighbours_alone() -> None:
    base = noise(40, 6)
    tables = similarity_tables(of_pair(one_site(base, base + torch.linspace(1, 9, 6))))
    assert tables is not None
    row = tables["similarity"].iloc[0]
    assert row["cka"] == pytest.approx(1, abs=1e-9)
    assert row["procrustes"] == pytest.approx(0, abs=1e-9)
    assert row["cka_p"] < 1e-6
    assert row["displacement"] > 5
    assert row["displacement_without_shift"] == pytest.approx(0, abs=1e-12)
    assert row["knn"] < 0.9
    assert row["knn_without_shift"] == 1


def test_equal_states_of_all_prompts_have_no_number_and_the_section_says_so() -> None:
    flat = torch.ones(20, 6, dtype=torch.float64)
    tables = similarity_tables(of_pair(one_site(flat, flat + 1)))
    assert tables is not None
    assert tables["similarity"][["cka", "rsa", "knn", "procrustes", "displacement"]].isna().all(axis=None)
    section = BY_NAME["similarity"].section(tables)
    assert section is not None
    assert "are equal under one of the models" in " ".join(section.reading)


def test_too_few_prompts_have_no_table_and_a_claim_can_ask_for_it() -> None:
    base = noise(5, 4)
    assert similarity_tables(of_pair(one_site(base, base + noise(5, 4, 1)))) is None
    asked = {"table": "similarity", "column": "cka", "where": {"position": "prompt_last", "site": POINT.site}}
    (claim,) = make_claims({"alike": {"says": "alike", "statistic": asked, "at_least": 0.95}}, where="own.yaml")
    assert claim.bound.value == 0.95
