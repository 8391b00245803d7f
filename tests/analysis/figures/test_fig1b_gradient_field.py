"""Gradients at a model's own states against whole backward passes; R, its interval, its tautology and its controls."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from analysis.figures.fig1b_gradient_field import GradientField, gradient_field_section, resultant_interval
from analysis.figures.fig1b_places import StateGradients, parting_places
from analysis.open.checkpoints import Checkpoints
from analysis.report.page import Section
from tests.analysis.asked import checkpoints
from tests.analysis.legible import assert_legible
from tiltmeter.errors import UserError
from tiltmeter.geometry.gradient_field import Context
from tiltmeter.models.layers import FINAL_POST_NORM, all_sites
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.states.capture import capture_gradients

SITES = all_sites(2)
BETA = 0.1


@pytest.fixture(scope="module")
def asked_about() -> Checkpoints:
    return checkpoints(10)


@pytest.fixture(scope="module")
def section(asked_about: Checkpoints) -> Section:
    return gradient_field_section(GradientField(model="aligned", n_pairs=6, points_per_axis=3).table(asked_about))


def pick(section: Section, **wanted: str) -> Any:
    rows = section.table
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    return rows


def last_logits(model: torch.nn.Module, context: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([context])).logits[0, -1]
    return logits


@pytest.mark.parametrize("kind", ["preference", "random"])
def test_the_gradient_at_a_state_is_that_of_a_whole_backward_pass(asked_about: Checkpoints, kind: Any) -> None:
    places = parting_places(asked_about.pairs, seed=3)
    taken = StateGradients(asked_about, places, of="aligned", sites=SITES)
    base, model = asked_about.base.model, asked_about.aligned.model
    for at in (0, 4):
        context, (w, other) = list(places[at].context), places[at].words[kind]
        for site in SITES:
            received: list[Tensor] = []
            with capture_gradients(model, received.append, site=site):
                logits = last_logits(model, context)
            reference = last_logits(base, context)
            margin = (logits[w] - logits[other]) - (reference[w] - reference[other]).detach()
            (-F.logsigmoid(BETA * margin)).backward()
            own = taken.states[site][at][None].double()
            found = taken.at_points(Context(model, context), at, site, kind, own)
            assert_close(found[0].float(), received[0][0, -1], rtol=1e-3, atol=1e-7)


def test_gradients_along_responses_are_those_of_the_pairs_loss(asked_about: Checkpoints) -> None:
    places = parting_places(asked_about.pairs, seed=0)
    taken = StateGradients(asked_about, places, of="aligned", sites=SITES)
    model, ids = asked_about.aligned.model, places[1].pair.ids
    batch = collate_pairs([ids], pair_index=[0], layout="shared_prefix")  # one state predicts both first words
    received: list[Tensor] = []
    with capture_gradients(model, received.append):
        ratios = sequence_log_probs(model, batch) - sequence_log_probs(asked_about.base.model, batch).detach()
    (-F.logsigmoid(BETA * (ratios[0] - ratios[1]))).backward()
    expected, found = received[0].flatten(0, 1), taken.along_responses(1)
    expected, found = (rows[rows.norm(dim=1) > 1e-6] for rows in (expected, found))
    assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_of_the_base_the_margin_is_zero_and_the_gradient_half_of_beta_v(asked_about: Checkpoints) -> None:
    places = parting_places(asked_about.pairs, seed=0)
    taken = StateGradients(asked_about, places, of="base", sites=[FINAL_POST_NORM])
    context = Context(asked_about.base.model, places[0].context)
    own = taken.states[FINAL_POST_NORM][0][None].double()
    found = taken.at_points(context, 0, FINAL_POST_NORM, "preference", own)
    assert_close(found[0], -0.5 * BETA * taken.v(0, "preference"), rtol=1e-5, atol=1e-9)


def test_r_is_one_by_tautology_at_the_last_site_alone(section: Section) -> None:
    grids = section.table[section.table["reading"] == "grid"]
    assert grids[grids["is_tautology"]]["site"].unique().tolist() == [FINAL_POST_NORM]
    tautology = pick(section, reading="grid", site=FINAL_POST_NORM)
    assert tautology["mean_resultant"].tolist() == pytest.approx([1, 1], abs=1e-9)
    assert tautology["smallest_cosine"].tolist() == pytest.approx([1, 1], abs=1e-9)
    others = grids[~grids["is_tautology"].astype(bool)]
    assert (others["mean_resultant"] < 1 - 1e-6).all()
    assert ["tautology" in sentence for sentence in section.sentences] == [False, True, False]


def test_the_figure_is_legible_and_its_section_whole(section: Section) -> None:
    assert_legible(section)
    assert all((section.claim, section.interval, section.limits, section.headlines))


def test_a_soft_cap_bends_the_field_so_that_nothing_is_a_tautology() -> None:
    capped = checkpoints(6, family="gemma2", attn="eager", final_logit_softcapping=0.5)
    found = gradient_field_section(GradientField(n_pairs=4, points_per_axis=3, sites=FINAL_POST_NORM).table(capped))
    assert not found.table["is_tautology"].any()
    assert (pick(found, reading="grid")["mean_resultant"] < 1 - 1e-6).all()
    assert "soft cap" in " ".join(found.reading)
    assert "tautology" not in " ".join(found.sentences)


def test_the_tables_say_what_was_taken(section: Section, asked_about: Checkpoints) -> None:
    n_sites = len(SITES)
    assert section.table.groupby("reading").size().to_dict() == {
        "grid": 2 * n_sites,
        "sequence": 1,
        "pairs": 2 * n_sites,
    }
    by_pair = section.more_tables["gradient_field_pairs"]
    of_grid = by_pair[(by_pair["reading"] == "grid") & (by_pair["words"] == "random") & (by_pair["site"] == "layer_00")]
    row = pick(section, reading="grid", words="random", site="layer_00").iloc[0]
    assert row["mean_resultant"] == pytest.approx(of_grid["mean_resultant"].mean())
    assert row["smallest_cosine"] == of_grid["smallest_cosine"].min()
    assert row["null"] == pytest.approx(27**-0.5)
    ids = parting_places(asked_about.pairs, seed=0)[0].pair.ids
    along = by_pair[by_pair["reading"] == "sequence"].iloc[0]
    assert ids.chosen_ids[0] == ids.rejected_ids[0], "so that the state which predicts both has no gradient"
    assert along["n_arrows"] == len(ids.chosen_ids) + len(ids.rejected_ids) - 2
    across = pick(section, reading="pairs")
    inside = across["mean_resultant"].between(across["mean_resultant_low"], across["mean_resultant_high"])
    assert inside.all()
    assert across["update_cosine"].between(-1, 1).all()


def test_p_of_shuffled_labels_is_the_share_of_all_ways_to_reverse_pairs(
    asked_about: Checkpoints, section: Section
) -> None:
    places = parting_places(asked_about.pairs, seed=0)[:6]
    taken = StateGradients(asked_about, places, of="aligned", sites=[FINAL_POST_NORM])
    v = torch.stack([taken.v(at, "preference") for at in range(6)])
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * 6)
    lengths = (signs @ (v / v.norm(dim=1, keepdim=True))).norm(dim=1)
    exact = float((lengths >= lengths[0] - 1e-9).double().mean())
    (row,) = pick(section, reading="pairs", words="preference", site=FINAL_POST_NORM).to_dict("records")
    assert row["p_shuffled"] == pytest.approx(exact, abs=0.05)


def test_the_mean_gradient_of_a_model_moved_down_it_points_to_the_update(asked_about: Checkpoints) -> None:
    """Planted: the aligned model is the base with its final states moved by −ĝ of all pairs, which v* must then be."""
    places = parting_places(asked_about.pairs, seed=0)
    taken = StateGradients(asked_about, places, of="base", sites=[FINAL_POST_NORM])
    v = torch.stack([taken.v(at, "preference") for at in range(len(places))])
    down = (v / v.norm(dim=1, keepdim=True)).mean(0)
    moved = checkpoints(10, aligned=0)
    final = moved.aligned.model.model.norm
    final.register_forward_hook(lambda _module, _inputs, hidden: hidden + 0.1 * down.float())
    found = gradient_field_section(GradientField(points_per_axis=2, sites=FINAL_POST_NORM).table(moved))
    row = pick(found, reading="pairs", words="preference").iloc[0]
    assert row["update_cosine"] == pytest.approx(1, abs=1e-4)


def vectors(n: int, mean: float, seed: int) -> Tensor:
    rows = torch.randn(n, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[:, 0] += mean
    return rows / rows.norm(dim=1, keepdim=True)


def test_the_interval_of_a_small_r_does_not_lie_above_it() -> None:
    def covered(interval: Callable[[Tensor], Any]) -> float:
        found = [interval(vectors(30, 0.0, seed)) for seed in range(30)]
        return float(np.mean([low <= 30**-0.5 <= high for _, low, high in found]))

    clusters = [str(i) for i in range(30)]
    assert covered(lambda unit: resultant_interval(unit, clusters)) > 0.8
    value, low, high = resultant_interval(vectors(30, 20.0, 0), clusters)
    assert low < value < high
    assert value == pytest.approx(float(vectors(30, 20.0, 0).mean(0).norm()), abs=1e-12)


def test_few_pairs_equal_responses_and_options_out_of_range_are_one_line(asked_about: Checkpoints) -> None:
    with pytest.raises(UserError, match=r"gradient_field: expected at least 4 pairs .* got 3 of 3"):
        GradientField().table(checkpoints(3))
    for options, said in (
        ({"n_pairs": 3}, r"gradient_field\.n_pairs: expected at least 4, got 3"),
        ({"points_per_axis": 1}, r"gradient_field\.points_per_axis: expected at least 2"),
        ({"step": 0.0}, r"gradient_field\.step: expected a number above 0"),
        ({"model": "both"}, r"gradient_field\.model: expected one of base, aligned, got both"),
        ({"dtype": "int8"}, r"gradient_field\.dtype: expected one of"),
    ):
        with pytest.raises(UserError, match=said):
            GradientField(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="this model has 2 blocks"):
        GradientField(sites="layer_07").table(asked_about)


def test_costs_count_a_token_for_every_point(asked_about: Checkpoints) -> None:
    states, gradients = GradientField(n_pairs=4, points_per_axis=3).costs(asked_about)
    contexts = [place.context for place in parting_places(asked_about.pairs, seed=0)]
    assert (states.forwards, states.tokens) == (2, 2 * sum(map(len, contexts)))
    assert (gradients.forwards, gradients.tokens) == (2, 2 * 4 * 28)  # layer 0, the preference's words and random ones
