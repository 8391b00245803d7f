"""Sweeps against one steered pass for each λ."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from analysis.open.checkpoints import Checkpoints
from analysis.steering.directions import States
from analysis.steering.sweep import SteeringSweep, Sweep, swept_sites
from analysis.steering.table import CHOOSING, Unit, best_site
from tests.analysis.asked import checkpoints
from tests.analysis.sweeps import LAMBDAS, Listener, as_table, make, values
from tiltmeter.models.generation import Decoding, generate
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.pairs.log_probs import model_inputs
from tiltmeter.steering.intervene import Intervention, steer
from tiltmeter.steering.operators import OPERATORS
from tiltmeter.steering.vector import V_STAR


@pytest.fixture(scope="module")
def asked_about() -> Checkpoints:
    return checkpoints(8)


def moved(tokens: str, n_prompt: int, n_answers: list[int]) -> Tensor:
    """Which tokens of [prompt | answer] are steered, a row an answer: said in words once more."""
    width = n_prompt + max(n_answers)
    at = torch.arange(width).expand(len(n_answers), -1)
    ends = torch.tensor(n_answers)[:, None] + n_prompt
    if tokens == "predicting":
        return (at >= n_prompt - 1) & (at < ends - 1)
    return {"all": at >= 0, "new": at >= n_prompt, "prompt": at < n_prompt}[tokens] & (at < ends)


@torch.no_grad()
def plain_figures(
    about: Checkpoints, sweep: Sweep, unit: Unit, strength: float, tokens: str = "predicting"
) -> tuple[float, float, float, float]:
    """R, the margin, KL from the start and R at first tokens, from whole passes, one pair at a time, through ``steer``."""
    base, aligned = about.base.model, about.aligned.model
    start, goal = (base, aligned) if unit.direction == "interpolation" else (aligned, base)
    sign = 1 if unit.direction == "interpolation" else -1
    vector = sweep.vectors[unit.vector, unit.site].values
    operator, along = sweep.asked.operator, vector[None]
    if operator == "rotate":
        states = States(about, sweep.halves.estimation, [unit.site], position="prompt_last")
        along = torch.stack([states.rows(unit.site, None)[0].mean(0), vector])
    sign = 1 if operator in ("project_out", "clamp") else sign
    sums: Tensor = torch.zeros(2, dtype=torch.float64)
    first: Tensor = torch.zeros(2, dtype=torch.float64)
    margins, away, n_tokens = [], 0.0, 0
    for pair in sweep.halves.test:
        batch = collate_pairs([pair.ids], pair_index=[0], layout="concatenated")
        n_chosen = len(pair.ids.chosen_ids)

        def logits(model, batch=batch):  # type: ignore[no-untyped-def]
            return model(**model_inputs(model, batch)).logits.flatten(0, 1)[batch.target_rows].double()

        mask = moved(tokens, len(pair.ids.prompt_ids), [n_chosen, len(pair.ids.rejected_ids)])
        with steer(start, Intervention(unit.site, along, sign * strength, operator, tokens=mask)):
            steered = logits(start)
        unsteered, aim = logits(start), logits(goal)
        log_probs = steered.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
        margins.append(float(log_probs[:n_chosen].sum() - log_probs[n_chosen:].sum()))
        p = aim[:n_chosen].log_softmax(-1)
        for i, other in enumerate((steered, unsteered)):
            by_token = (p.exp() * (p - other[:n_chosen].log_softmax(-1))).sum(-1)
            sums[i] += by_token.sum()
            first[i] += by_token[0]
        q = unsteered[:n_chosen].log_softmax(-1)
        away += float((q.exp() * (q - steered[:n_chosen].log_softmax(-1))).sum())
        n_tokens += n_chosen
    margin = sum(margins) / len(margins)
    return float(1 - sums[0] / sums[1]), margin, away / n_tokens, float(1 - first[0] / first[1])


@pytest.mark.parametrize("direction", ["interpolation", "inversion"])
@pytest.mark.parametrize("site", [*swept_sites(None, 2)])
def test_a_unit_is_what_steered_passes_give(asked_about: Checkpoints, direction: str, site: str) -> None:
    sweep = make(asked_about)
    unit = Unit(direction, V_STAR, site, "teacher_forced")  # type: ignore[arg-type]
    rows = as_table(sweep.rows(unit))
    for strength in (-1.0, 0.5, 1.0):
        recovery, margin, away, first = plain_figures(asked_about, sweep, unit, strength)
        assert values(rows, "recovery", strength) == pytest.approx([recovery], abs=1e-4)
        assert values(rows, "preference_odds", strength) == pytest.approx([margin], abs=1e-3)
        assert values(rows, "kl_from_start", strength) == pytest.approx([away], rel=1e-4)
        unsteered = values(rows, "preference_odds", 0.0)[0]
        assert values(rows, "preference_odds_change", strength) == pytest.approx([margin - unsteered], abs=1e-3)
        assert values(rows, "recovery_first_token", strength) == pytest.approx([first], abs=1e-4)
    assert values(rows, "recovery", 0.0) == [0.0]


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "add"])
def test_every_operator_is_swept_as_steered_passes_do_it(asked_about: Checkpoints, operator: str) -> None:
    sweep = make(asked_about, vectors=[], operator=operator, n_random=2, sites="layer_00")
    for direction in ("interpolation", "inversion"):
        unit = Unit(direction, V_STAR, "layer_00", "teacher_forced")  # type: ignore[arg-type]
        taken = sweep.rows(unit)
        rows, pairs = as_table(taken), pd.DataFrame(taken.pairs)
        assert set(rows["operator"]) == {operator}
        assert values(rows, "recovery", 0.0) == [0.0], "0 is the model as it is, of clamp too"
        for strength in (-1.0, 0.5):
            recovery, margin, *_ = plain_figures(asked_about, sweep, unit, strength)
            assert values(rows, "recovery", strength) == pytest.approx([recovery], abs=1e-4)
            assert values(rows, "preference_odds", strength) == pytest.approx([margin], abs=1e-3)
        drawn = pd.DataFrame(sweep.rows(unit._replace(vector="random")).pairs)
        assert set(pairs["norm"].abs().round(4)) >= set(drawn["norm"].abs().round(4)), "compared where equally strong"
    own, first = sweep.vectors[V_STAR, "layer_00"], sweep.made.drawn["random", "layer_00"][0]
    sweep.made.by_key[V_STAR, "layer_00"] = first  # a random vector in its place is what the sweep of draws says of it
    alone = as_table(sweep.rows(unit))
    sweep.made.by_key[V_STAR, "layer_00"] = own
    of_draws = as_table(sweep.rows(unit._replace(vector="random"))).query("draw == 1")
    for metric in ("recovery", "kl_from_start", "preference_odds_change", "recovery_first_token"):
        assert values(of_draws, metric, 1.0) == pytest.approx(values(alone, metric, 1.0), abs=1e-4)


@pytest.mark.parametrize("operator", ["project_out", "rotate"])
def test_text_under_an_operator_is_what_steered_models_say(asked_about: Checkpoints, operator: str) -> None:
    listener = Listener()
    sweep = make(
        asked_about,
        scorers={"x": listener},
        vectors=[],
        lambdas=[2.0],
        operator=operator,
        n_generated=2,
        sites="layer_00",
    )
    sweep.rows(Unit("inversion", V_STAR, "layer_00", "generated"))
    vector, sign = sweep.vectors[V_STAR, "layer_00"].values[None], 1.0 if operator == "project_out" else -1.0
    if operator == "rotate":
        vector = torch.cat([sweep.made.means["layer_00"][None], vector])
    said, opened = [], asked_about.aligned
    for pair in sweep.halves.test[:2]:
        reached = moved("predicting", len(pair.ids.prompt_ids), [sweep.asked.decoding.max_new_tokens + 1])
        with steer(opened.model, Intervention("layer_00", vector, sign * 2, operator, tokens=reached)):  # type: ignore[arg-type]
            said.append(
                generate(opened.model, opened.tokenizer, [pair.ids.prompt_ids], sweep.asked.decoding)[0][0].text
            )
    assert [steered for _, steered in listener.heard[1]] == said
    assert said != [unsteered for unsteered, _ in listener.heard[1]], "steering had no effect"


@pytest.mark.parametrize("tokens", ["all", "new", "prompt"])
def test_only_the_tokens_that_are_asked_for_are_steered(asked_about: Checkpoints, tokens: str) -> None:
    asked = SteeringSweep(scorers={}, vectors=[], lambdas=LAMBDAS, n_random=1, tokens=tokens)  # type: ignore[arg-type]
    sweep = asked.plan(asked_about)
    unit = Unit("interpolation", V_STAR, "layer_00", "teacher_forced")
    rows = as_table(sweep.rows(unit))
    recovery, margin, *_ = plain_figures(asked_about, sweep, unit, 1.0, tokens)
    assert values(rows, "recovery", 1.0) == pytest.approx([recovery], abs=1e-4)
    assert values(rows, "preference_odds", 1.0) == pytest.approx([margin], abs=1e-3)


def test_what_pairs_add_is_what_the_table_says(asked_about: Checkpoints) -> None:
    sweep = make(asked_about)
    taken = sweep.rows(Unit("inversion", V_STAR, "layer_00", "teacher_forced"))
    rows, pairs = as_table(taken), pd.DataFrame(taken.pairs)
    assert pairs["pair_id"].nunique() == len(sweep.halves.test)
    for strength, of in pairs.groupby("strength"):
        n = of["n_tokens"].sum()
        assert values(rows, "kl", strength) == pytest.approx([of["kl"].sum() / n])  # type: ignore[arg-type]
        assert values(rows, "kl_from_start", strength) == pytest.approx([of["kl_from_start"].sum() / n])  # type: ignore[arg-type]
        assert values(rows, "preference_odds", strength) == pytest.approx([of["preference_odds"].mean()])  # type: ignore[arg-type]


def test_the_site_of_a_headline_is_chosen_on_other_pairs(asked_about: Checkpoints, tmp_path: Path) -> None:
    sweep = make(asked_about)
    halves = sweep.halves._replace(test=sweep.halves.estimation)
    for unit in [unit for unit in sweep.units if unit.part == "choosing"]:
        (row,) = sweep.rows(unit).rows
        assert (row.metric, row.strength) == (CHOOSING, 1.0)
        other = Sweep(sweep.asked, asked_about, halves, sweep.made)
        assert row.value == pytest.approx(plain_figures(asked_about, other, unit, 1.0)[0], abs=1e-4)
    rows = [("interpolation", V_STAR, s, 1.0, m, v) for s, m, v in [("a", CHOOSING, 0.2), ("b", CHOOSING, 0.3)]]
    rows += [("interpolation", V_STAR, "a", 1.0, "recovery", 0.9), ("interpolation", V_STAR, "b", 1.0, "recovery", 0.1)]
    table = pd.DataFrame(rows, columns=["direction", "vector", "site", "lambda", "metric", "value"])
    assert best_site(table, "interpolation") == "b"


@torch.no_grad()
def said_through_steer(about: Checkpoints, sweep: Sweep, direction: str, tokens: str) -> list[list[str]]:
    """What steered models say, one prompt and λ at a time."""
    opened, sign = (about.base, 1) if direction == "interpolation" else (about.aligned, -1)
    vector, decoding = sweep.vectors[V_STAR, "layer_00"].values, sweep.asked.decoding
    said = []
    for strength in sweep.asked.lambdas:
        texts = []
        for pair in sweep.halves.test[:3]:
            prompt = pair.ids.prompt_ids
            reached = moved(tokens, len(prompt), [decoding.max_new_tokens + 1])
            with steer(opened.model, Intervention("layer_00", vector[None], sign * strength, tokens=reached)):
                texts.append(generate(opened.model, opened.tokenizer, [prompt], decoding)[0][0].text)
        said.append(texts)
    return said


@pytest.mark.parametrize(
    ("direction", "tokens"),
    [
        ("interpolation", "predicting"),
        ("inversion", "predicting"),
        ("interpolation", "new"),
        ("interpolation", "all"),
        ("inversion", "prompt"),
    ],
)
def test_what_is_scored_is_what_steered_models_say(asked_about: Checkpoints, direction: str, tokens: str) -> None:
    listener = Listener()
    asked = SteeringSweep(
        scorers={"x": listener},
        decoding=Decoding(max_new_tokens=8),
        vectors=[],
        lambdas=(-4.0, 4.0),
        n_random=1,
        n_generated=3,
        tokens=tokens,  # type: ignore[arg-type]
    )
    sweep = asked.plan(asked_about)
    rows = sweep.rows(Unit(direction, V_STAR, "layer_00", "generated")).rows  # type: ignore[arg-type]
    said = said_through_steer(asked_about, sweep, direction, tokens)
    unsteered = said[asked.lambdas.index(0.0)]
    assert listener.heard == [list(zip(unsteered, one, strict=True)) for one in said]
    assert len({tuple(one) for one in said}) == 3, "steering had no effect"
    assert {row.strength for row in rows if row.metric == "degeneration"} == {-4.0, 0.0, 4.0}
