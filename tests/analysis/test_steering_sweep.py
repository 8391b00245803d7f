"""Sweeps against one steered pass for each λ; λ = 0, resuming, settings that changed, damaged tables."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from analysis.checkpoints import Checkpoints
from analysis.steering_directions import V_BAR, V_STAR, estimate_vectors, split_by_prompt
from analysis.steering_section import ceiling, steering_section
from analysis.steering_sweep import SteeringSweep, Sweep, default_sites
from analysis.sweep_table import SETTINGS, SweepTable, Unit, read_settings, read_sweep
from tests.analysis.asked import checkpoints
from tiltmeter.batch import collate_pairs
from tiltmeter.errors import UserError
from tiltmeter.generation import Decoding, generate
from tiltmeter.layers import FINAL_POST_NORM
from tiltmeter.log_probs import model_inputs
from tiltmeter.scoring.degeneration import DegenerationScorer
from tiltmeter.scoring.scorer import Sample, Scores
from tiltmeter.steering import Intervention, steer

LAMBDAS = (-1.0, 1.0, 0.5)


@pytest.fixture(scope="module")
def asked_about() -> Checkpoints:
    return checkpoints(12)


def make(about: Checkpoints, *, scorers: bool = False, lambdas: Sequence[float] = LAMBDAS, seed: int = 0) -> Sweep:
    options = {"degeneration": DegenerationScorer()} if scorers else {}
    decoding = Decoding(max_new_tokens=6)
    return SteeringSweep(
        scorers=options, decoding=decoding, lambdas=lambdas, n_random=2, n_generated=3, seed=seed
    ).start(about)


def run(sweep: Sweep, folder: Path, *, n_units: int | None = None, restart: bool = False) -> SweepTable:
    table = SweepTable(folder, sweep.settings, restart=restart)
    for unit in [unit for unit in sweep.units if unit not in table.finished][:n_units]:
        table.append(unit, sweep.rows(unit))
    return table


def values(table: pd.DataFrame, metric: str, strength: float) -> list[float]:
    return table[(table["metric"] == metric) & (table["lambda"] == strength)]["value"].tolist()


@torch.no_grad()
def plain_figures(about: Checkpoints, sweep: Sweep, unit: Unit, strength: float) -> tuple[float, float]:
    """R and the margin from whole passes, one pair at a time, through ``steer``."""
    base, aligned = about.base.model, about.aligned.model
    start, goal = (base, aligned) if unit.direction == "interpolation" else (aligned, base)
    sign = 1 if unit.direction == "interpolation" else -1
    vector = sweep.vectors[unit.vector, unit.site].values
    sums: Tensor = torch.zeros(2, dtype=torch.float64)
    margins = []
    for pair in sweep.halves.test:
        batch = collate_pairs([pair.ids], pair_index=[0], layout="concatenated")
        n_chosen = len(pair.ids.chosen_ids)

        def logits(model, batch=batch):  # type: ignore[no-untyped-def]
            return model(**model_inputs(model, batch)).logits.flatten(0, 1)[batch.target_rows].double()

        with steer(start, Intervention(unit.site, vector[None], sign * strength)):
            steered = logits(start)
        unsteered, aim = logits(start), logits(goal)
        log_probs = steered.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
        margins.append(float(log_probs[:n_chosen].sum() - log_probs[n_chosen:].sum()))
        p = aim[:n_chosen].log_softmax(-1)
        for i, other in enumerate((steered, unsteered)):
            sums[i] += (p.exp() * (p - other[:n_chosen].log_softmax(-1))).sum()
    return float(1 - sums[0] / sums[1]), sum(margins) / len(margins)


@pytest.mark.parametrize("direction", ["interpolation", "inversion"])
@pytest.mark.parametrize("site", [*default_sites(2)])
def test_a_unit_is_what_steered_passes_give(asked_about: Checkpoints, direction: str, site: str) -> None:
    sweep = make(asked_about)
    unit = Unit(direction, V_STAR, site, "teacher_forced")  # type: ignore[arg-type]
    rows = pd.DataFrame(sweep.rows(unit)).rename(columns={"strength": "lambda"})
    for strength in (-1.0, 0.5, 1.0):
        recovery, margin = plain_figures(asked_about, sweep, unit, strength)
        assert values(rows, "recovery", strength) == pytest.approx([recovery], abs=1e-4)
        assert values(rows, "preference_odds", strength) == pytest.approx([margin], abs=1e-3)
    assert values(rows, "recovery", 0.0) == [0.0]


class Listener(DegenerationScorer):
    """Keeps what it is asked to score."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[list[tuple[str, str]]] = []

    def score(self, samples: Sequence[Sample]) -> Scores:
        self.heard.append([(sample.base.text, sample.policy.text) for sample in samples])
        return super().score(samples)


@pytest.mark.parametrize(("direction", "sign"), [("interpolation", 1), ("inversion", -1)])
def test_what_is_scored_is_what_steered_models_say(asked_about: Checkpoints, direction: str, sign: int) -> None:
    listener, decoding = Listener(), Decoding(max_new_tokens=8)
    asked = SteeringSweep(scorers={"x": listener}, decoding=decoding, lambdas=(-4.0, 4.0), n_random=1, n_generated=3)
    sweep = asked.start(asked_about)
    unit = Unit(direction, V_STAR, "layer_00", "generated")  # type: ignore[arg-type]
    rows = sweep.rows(unit)
    opened = asked_about.base if direction == "interpolation" else asked_about.aligned
    prompts = [pair.ids.prompt_ids for pair in sweep.halves.test[:3]]
    vector = sweep.vectors[V_STAR, "layer_00"].values
    said = []
    for strength in asked.lambdas:
        with steer(opened.model, Intervention("layer_00", vector[None], sign * strength, tokens="new")):
            answers = generate(opened.model, opened.tokenizer, prompts, decoding)
        said.append([answer[0].text for answer in answers])
    unsteered = said[asked.lambdas.index(0.0)]
    assert listener.heard == [list(zip(unsteered, one, strict=True)) for one in said]
    assert len({tuple(one) for one in said}) == 3, "steering had no effect"
    assert {row.strength for row in rows if row.metric == "degeneration"} == {-4.0, 0.0, 4.0}


def test_unsteered_rows_are_the_same_for_all_vectors(asked_about: Checkpoints, tmp_path: Path) -> None:
    table = read_sweep(run(make(asked_about), tmp_path).path)
    assert set(values(table, "recovery", 0.0)) == {0.0}
    for direction in ("interpolation", "inversion"):
        of = table[(table["direction"] == direction) & (table["lambda"] == 0)]
        for metric in ("kl", "top1_agreement"):
            found = values(of, metric, 0.0)
            assert found == pytest.approx([found[0]] * len(found), rel=1e-6)
    assert set(table["vector"]) == {V_STAR, V_BAR, "random_1", "random_2"}
    assert set(table[table["vector"] == V_BAR]["site"]) == {FINAL_POST_NORM}


def test_vectors_come_from_other_prompts_and_have_the_length_of_v_star(asked_about: Checkpoints) -> None:
    halves = split_by_prompt(asked_about.pairs, seed=3)
    assert {p.group for p in halves.estimation}.isdisjoint({p.group for p in halves.test})
    assert len(halves.estimation) + len(halves.test) == len(asked_about.pairs)
    assert split_by_prompt(asked_about.pairs[::-1], seed=3).test == halves.test[::-1]
    found = estimate_vectors(asked_about, halves.estimation, default_sites(2), n_random=2, seed=0)
    for (_, site), vector in found.items():
        assert vector.norm() == pytest.approx(found[V_STAR, site].norm(), rel=1e-6)


def test_a_sweep_that_was_stopped_goes_on_to_the_same_table(asked_about: Checkpoints, tmp_path: Path) -> None:
    whole = run(make(asked_about, scorers=True), tmp_path / "whole")
    run(make(asked_about, scorers=True), tmp_path / "parts", n_units=4)
    with (tmp_path / "parts" / "sweep.csv").open("a") as file:
        file.write("interpolation,v*,layer_00,0.5,reco")  # the process ended while it wrote
    parts = run(make(asked_about, scorers=True), tmp_path / "parts")
    assert parts.path.read_bytes() == whole.path.read_bytes()
    assert parts.finished == whole.finished == make(asked_about, scorers=True).units
    assert (read_sweep(whole.path)["metric"] == "degeneration").any()


def test_other_settings_are_refused_and_a_restart_is_not(asked_about: Checkpoints, tmp_path: Path) -> None:
    run(make(asked_about), tmp_path, n_units=1)
    other = make(asked_about, lambdas=(0.0, 2.0))
    with pytest.raises(UserError, match=r"sweep\.csv: was begun with lambdas=.*steering\.restart=true"):
        SweepTable(tmp_path, other.settings)
    with pytest.raises(UserError, match=r"was begun with (seed|vectors|test_pairs)="):
        SweepTable(tmp_path, make(asked_about, seed=1).settings)
    assert SweepTable(tmp_path, other.settings, restart=True).finished == []
    assert read_settings(tmp_path)["lambdas"] == [0.0, 2.0]


@pytest.mark.parametrize("damage", ["shorter", "columns", "number", "state", "no state"])
def test_a_damaged_table_is_one_line(asked_about: Checkpoints, tmp_path: Path, damage: str) -> None:
    sweep = make(asked_about)
    path = run(sweep, tmp_path, n_units=1).path
    text = path.read_text()
    if damage == "shorter":
        path.write_text(text[:-30])
    elif damage == "columns":
        path.write_text(text.replace("metric", "metrik"))
    elif damage == "number":
        path.write_text(text.replace(",0.5,", ",x.5,"))
    elif damage == "state":
        (tmp_path / SETTINGS).write_text("{")
    else:
        (tmp_path / SETTINGS).unlink()
    with pytest.raises(UserError, match=r"sweep\.(csv|json): ") as caught:
        SweepTable(tmp_path, sweep.settings)
    assert "\n" not in str(caught.value)
    assert "steering.restart=true" in str(caught.value)


def test_the_section_is_drawn_from_the_table_alone(asked_about: Checkpoints, tmp_path: Path) -> None:
    table = run(make(asked_about, scorers=True), tmp_path)
    section = steering_section(read_sweep(table.path), read_settings(tmp_path))
    assert section is not None
    assert len(section.sentences) == 5
    assert "at λ = 1; the best of 2 random vectors" in section.sentences[0]
    assert section.shown is not None
    assert len(section.shown) == 2 * 4  # v* at three sites, v̄ at one, both directions


def test_the_ceiling_is_the_first_strength_above_a_tenth() -> None:
    rows = [
        ("interpolation", V_STAR, "layer_00", x, "degeneration", y, y, y, 10)
        for x, y in ((-1.0, 0.9), (0.0, 0.0), (1.0, 0.1), (2.0, 0.2), (3.0, 0.9))
    ]
    columns = ["direction", "vector", "site", "lambda", "metric", "value", "ci_low", "ci_high", "n"]
    table = pd.DataFrame(rows, columns=columns)
    assert ceiling(table, "interpolation", V_STAR, "layer_00") == 2.0
    assert ceiling(table[table["lambda"] < 2], "interpolation", V_STAR, "layer_00") is None


def test_zero_is_added_to_a_grid_without_it() -> None:
    asked = SteeringSweep(scorers={}, lambdas=[2.0, 1.0])
    assert asked.lambdas == [0.0, 1.0, 2.0]
    assert asked.added_zero
    assert not SteeringSweep(scorers={}).added_zero


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"lambdas": [0.0]}, "lambdas"),
        ({"lambdas": [1.0, 1.0]}, "lambdas"),
        ({"lambdas": [float("nan")]}, "lambdas"),
        ({"n_random": 0}, "n_random"),
        ({"n_prompts": 0}, "n_prompts"),
        ({"n_generated": -1}, "n_generated"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=rf"^steering\.{key}: expected"):
        SteeringSweep(scorers={}, **options)  # type: ignore[arg-type]


def test_models_that_do_not_differ_have_no_vector() -> None:
    with pytest.raises(UserError, match="same hidden states"):
        make(checkpoints(8, base=0, aligned=0))


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="at least 4 prompts"):
        split_by_prompt(checkpoints(3).pairs, seed=0)


def test_settings_are_plain(asked_about: Checkpoints) -> None:
    json.dumps(make(asked_about, scorers=True).settings)
