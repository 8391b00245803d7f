"""The transfer matrix against one steered pass a cell, a planted shift that it must find, its halves and its differences."""

from typing import Any

import pandas as pd
import pytest
import torch

from analysis.figures.transfer import OWN_LESS_OTHERS, OWN_LESS_RANDOM, transfer_section
from analysis.open.checkpoints import Checkpoints
from analysis.report.page import Section
from analysis.steering.directions import States, split_by_prompt, v_star
from analysis.steering.transfer import Transfer
from tests.analysis.asked import checkpoints
from tests.analysis.legible import assert_legible
from tiltmeter.errors import UserError
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM, all_sites
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.pairs.log_probs import model_inputs
from tiltmeter.steering.intervene import Intervention, steer

SITES = all_sites(2)


def section_of(asked: Transfer, asked_about: Checkpoints) -> Section:
    return transfer_section(*asked.table(asked_about))


@pytest.fixture(scope="module")
def asked_about() -> Checkpoints:
    return checkpoints(12)


@pytest.fixture(scope="module")
def section(asked_about: Checkpoints) -> Section:
    return section_of(Transfer(n_random=2), asked_about)


def cell(section: Section, source: str, site: str) -> pd.Series:
    rows = section.table
    return rows[(rows["source"] == source) & (rows["site"] == site)].iloc[0]


@torch.no_grad()
def plain_cell(about: Checkpoints, source: str, site: str) -> tuple[float, float]:
    """R and the change of margin from whole passes through ``steer``, a pair at a time."""
    base, aligned = about.base.model, about.aligned.model
    estimation, test = split_by_prompt(about.pairs, seed=0)
    states = States(about, estimation, SITES, position="prompt_last")
    direction = v_star(states, source)
    v = (direction / direction.norm() * v_star(states, site).norm()).float()
    kl, change = torch.zeros(2, dtype=torch.float64), 0.0
    for pair in test:
        batch = collate_pairs([pair.ids], pair_index=[0], layout="concatenated")
        n_chosen = len(pair.ids.chosen_ids)
        mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        mask.view(-1)[batch.target_rows] = True

        def log_probs(model: Any, batch: Any = batch) -> torch.Tensor:
            logits = model(**model_inputs(model, batch)).logits.flatten(0, 1)[batch.target_rows].double()
            return logits.log_softmax(-1)

        with steer(base, Intervention(site, v[None], tokens=mask)):
            steered = log_probs(base)
        unsteered, aim = log_probs(base), log_probs(aligned)[:n_chosen]
        moved = (steered - unsteered).gather(1, batch.target_ids[:, None])[:, 0]
        change += float(moved[:n_chosen].sum() - moved[n_chosen:].sum()) / len(test)
        for i, other in enumerate((steered, unsteered)):
            kl[i] += (aim.exp() * (aim - other[:n_chosen])).sum()
    return float(1 - kl[0] / kl[1]), change


@pytest.mark.parametrize(
    ("source", "site"), [("layer_00", "layer_00"), (FINAL_POST_NORM, "layer_00"), ("layer_00", FINAL_PRE_NORM)]
)
def test_a_cell_is_what_steered_passes_give(asked_about: Checkpoints, section: Section, source: str, site: str) -> None:
    recovery, change = plain_cell(asked_about, source, site)
    found = cell(section, source, site)
    assert found["recovery"] == pytest.approx(recovery, abs=1e-4)
    assert found["margin_change"] == pytest.approx(change, abs=1e-3)
    assert found["n"] == 6


def test_a_planted_constant_shift_is_recovered_whole_at_its_own_site() -> None:
    planted = checkpoints(12, aligned=0)
    shift = 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    planted.aligned.model.model.norm.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + shift,))
    found = section_of(Transfer(sites=[FINAL_PRE_NORM, FINAL_POST_NORM], n_random=2), planted)
    own = cell(found, FINAL_PRE_NORM, FINAL_PRE_NORM)
    assert own["recovery"] == pytest.approx(1, abs=1e-4)
    assert own["norm"] == pytest.approx(float(shift.norm()), rel=1e-4)
    assert cell(found, FINAL_POST_NORM, FINAL_PRE_NORM)["recovery"] < 0.99
    aligned_change = float(found.sentences[1].rpartition(" ")[2].replace("−", "-"))
    assert own["margin_change"] == pytest.approx(aligned_change, abs=0.051)


def test_differences_are_those_of_the_cells(section: Section) -> None:
    for column in ("recovery", "margin_change"):
        for site in SITES:
            own = cell(section, site, site)[column]
            others = sum(cell(section, source, site)[column] for source in SITES if source != site) / (len(SITES) - 1)
            random = sum(cell(section, f"random_{i}", site)[column] for i in (1, 2)) / 2
            assert cell(section, OWN_LESS_OTHERS, site)[column] == pytest.approx(own - others)
            assert cell(section, OWN_LESS_RANDOM, site)[column] == pytest.approx(own - random)
    assert section.table["recovery"].between(section.table["recovery_low"], section.table["recovery_high"]).all()


def test_every_vector_is_added_at_every_site_at_the_length_of_its_own(section: Section) -> None:
    n_sources = len(SITES) + 2 + 2
    assert section.table.groupby("site").size().tolist() == [n_sources] * len(SITES)
    assert section.table.groupby("site")["norm"].nunique().eq(1).all()
    own = section.table[section.table["source"] == section.table["site"]]
    assert own["cosine"].tolist() == pytest.approx([1.0] * len(SITES))
    assert section.table["cosine"].abs().max() <= 1 + 1e-9
    assert section.shown is not None
    assert len(section.shown) == len(SITES)


@pytest.mark.parametrize("n_layers", [2, 40])
def test_the_figure_is_legible_and_its_section_whole(section: Section, n_layers: int) -> None:
    sites = all_sites(n_layers)
    sources = [*sites, "random_1", OWN_LESS_OTHERS, OWN_LESS_RANDOM]
    table = pd.DataFrame(
        [
            {"source": source, "site": site, "kind": "random" if source == "random_1" else "v*"}
            for site in sites
            for source in sources
        ]
    )
    figures = [column for column in section.table if column not in table]
    settings = {
        "n_estimation": 6,
        "n_test": 6,
        "n_random": {"layer_00": 1},
        "position": "prompt_last",
        "aligned_change": 1.5,
    }
    values = {name: "not distinguishable" if name.endswith("verdict") else -0.5 for name in figures}
    drawn = transfer_section(table.assign(**values), settings)
    assert_legible(drawn)
    assert all((drawn.claim, drawn.interval, drawn.limits, drawn.headlines))


def test_vectors_and_numbers_come_from_other_prompts(asked_about: Checkpoints) -> None:
    asked = Transfer(n_random=1, n_prompts=2, seed=4)
    found = section_of(asked, asked_about)
    assert set(found.table["n"]) == {2}
    assert "6 held-out pairs. Numbers are of 2 other pairs" in found.reading[0]
    (cost,) = asked.costs(asked_about)
    test = split_by_prompt(asked_about.pairs, seed=4).test[:2]
    n_tokens = sum(2 * len(p.ids.prompt_ids) + len(p.ids.chosen_ids) + len(p.ids.rejected_ids) for p in test)
    passes = (
        1 + (1 + 4 / 2) + 1 + 1
    )  # the aligned model's, layer 0 with 4 vectors above it, and two sites without a block
    assert (cost.forwards, cost.tokens) == (passes, round(passes * n_tokens))


def test_models_that_do_not_differ_and_options_out_of_range_are_one_line(asked_about: Checkpoints) -> None:
    with pytest.raises(UserError, match="aligned: expected a model whose hidden states at layer_00 are not the base"):
        Transfer().table(checkpoints(8, aligned=0))
    with pytest.raises(UserError, match=r"transfer\.sites: expected at least two sites or all, got layer_00"):
        Transfer(sites="layer_00").table(asked_about)
    for options, said in (
        ({"n_random": 0}, r"transfer\.n_random: expected at least 1, got 0"),
        ({"n_prompts": 0}, r"transfer\.n_prompts: expected at least 1, got 0"),
        ({"position": "response_all"}, r"transfer\.position: expected one of prompt_last, .* got response_all"),
        ({"dtype": "int8"}, r"transfer\.dtype: expected one of"),
    ):
        with pytest.raises(UserError, match=said):
            Transfer(**options)  # type: ignore[arg-type]
