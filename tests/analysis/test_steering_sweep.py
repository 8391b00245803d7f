"""Sweeps against one steered pass for each λ; λ = 0, resuming, settings that changed, damaged tables."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from analysis.checkpoints import Checkpoints
from analysis.figures import COLOURS
from analysis.steering_directions import V_BAR, V_STAR, split_by_prompt
from analysis.steering_panels import best_site, ceiling
from analysis.steering_section import steering_section
from analysis.steering_sweep import CHOOSING, SteeringSweep, Sweep, default_sites
from analysis.sweep_table import PAIRS, SETTINGS, TABLE, Rows, SweepTable, Unit, read_pairs, read_settings, read_sweep
from tests.analysis.asked import checkpoints
from tests.analysis.legible import assert_legible
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
    return checkpoints(8)


@pytest.fixture(scope="module")
def swept(asked_about: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> SweepTable:
    return run(make(asked_about), tmp_path_factory.mktemp("swept"))


def make(about: Checkpoints, **changes: Any) -> Sweep:
    options = {
        "scorers": {"degeneration": DegenerationScorer()},
        "decoding": Decoding(max_new_tokens=6),
        "vectors": ["v_bar"],
        "lambdas": LAMBDAS,
        "n_random": 2,
        "n_generated": 2,
    }
    return SteeringSweep(**(options | changes)).plan(about)


def make_small(about: Checkpoints, **changes: Any) -> Sweep:
    return make(about, **({"vectors": [], "n_random": 1, "sites": "final_post_norm"} | changes))


def run(sweep: Sweep, folder: Path, *, n_units: int | None = None, restart: bool = False) -> SweepTable:
    table = SweepTable(folder, sweep.settings, restart=restart)
    for unit in [unit for unit in sweep.units if unit not in table.finished][:n_units]:
        table.append(unit, sweep.rows(unit))
    return table


def values(table: pd.DataFrame, metric: str, strength: float) -> list[float]:
    return table[(table["metric"] == metric) & (table["lambda"] == strength)]["value"].tolist()


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
    sums: Tensor = torch.zeros(2, dtype=torch.float64)
    first: Tensor = torch.zeros(2, dtype=torch.float64)
    margins, away, n_tokens = [], 0.0, 0
    for pair in sweep.halves.test:
        batch = collate_pairs([pair.ids], pair_index=[0], layout="concatenated")
        n_chosen = len(pair.ids.chosen_ids)

        def logits(model, batch=batch):  # type: ignore[no-untyped-def]
            return model(**model_inputs(model, batch)).logits.flatten(0, 1)[batch.target_rows].double()

        mask = moved(tokens, len(pair.ids.prompt_ids), [n_chosen, len(pair.ids.rejected_ids)])
        with steer(start, Intervention(unit.site, vector[None], sign * strength, tokens=mask)):
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
@pytest.mark.parametrize("site", [*default_sites(2)])
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


def as_table(taken: Rows) -> pd.DataFrame:
    return pd.DataFrame(taken.rows).rename(columns={"strength": "lambda"})


class Listener(DegenerationScorer):
    """Keeps what it is asked to score."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[list[tuple[str, str]]] = []

    def score(self, samples: Sequence[Sample]) -> Scores:
        self.heard.append([(sample.base.text, sample.policy.text) for sample in samples])
        return super().score(samples)


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


def test_unsteered_rows_are_the_same_for_all_vectors(swept: SweepTable) -> None:
    table = read_sweep(swept.path)
    assert set(values(table, "recovery", 0.0)) == {0.0}
    for direction in ("interpolation", "inversion"):
        of = table[(table["direction"] == direction) & (table["lambda"] == 0)]
        for metric in ("kl", "top1_agreement"):
            found = values(of, metric, 0.0)
            assert found == pytest.approx([found[0]] * len(found), rel=1e-6)
    assert set(table["vector"]) == {V_STAR, V_BAR, "random_1", "random_2"}
    assert set(table[table["vector"] == V_BAR]["site"]) == {FINAL_POST_NORM}
    assert "random_2" not in set(table[table["metric"] == "degeneration"]["vector"]), "one random vector says something"


def test_a_sweep_that_was_stopped_goes_on_to_the_same_table(asked_about: Checkpoints, tmp_path: Path) -> None:
    whole = run(make_small(asked_about), tmp_path / "whole")
    run(make_small(asked_about), tmp_path / "parts", n_units=4)
    with (tmp_path / "parts" / "sweep.csv").open("a") as file:
        file.write("interpolation,v*,layer_00,0.5,reco")  # the process ended while it wrote
    with (tmp_path / "parts" / PAIRS).open("a") as file:
        file.write("interpolation,v*,layer_00,0.5,memory/3,ab")
    parts = run(make_small(asked_about), tmp_path / "parts")
    for name in (TABLE, PAIRS):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert parts.finished == whole.finished == make_small(asked_about).units
    assert (read_sweep(whole.path)["metric"] == "degeneration").any()


def test_other_settings_are_refused_and_a_restart_is_not(asked_about: Checkpoints, tmp_path: Path) -> None:
    run(make_small(asked_about), tmp_path, n_units=1)
    other = make_small(asked_about, lambdas=(0.0, 2.0))
    with pytest.raises(UserError, match=r"sweep\.csv: was begun with lambdas=.*steering\.restart=true"):
        SweepTable(tmp_path, other.settings)
    for key, change in (("seed", 1), ("tokens", "all"), ("vectors", ["probe"]), ("position", "diverge")):
        with pytest.raises(UserError, match=rf"was begun with {key}="):
            SweepTable(tmp_path, make_small(asked_about, **{key: change}).settings)
    assert SweepTable(tmp_path, other.settings, restart=True).finished == []
    assert read_settings(tmp_path)["lambdas"] == [0.0, 2.0]


@pytest.mark.parametrize("damage", ["shorter", "columns", "number", "state", "no state", "no pairs", "pairs"])
def test_a_damaged_table_is_one_line(asked_about: Checkpoints, tmp_path: Path, damage: str) -> None:
    sweep = make_small(asked_about)
    path = run(sweep, tmp_path, n_units=3).path
    text = path.read_text()
    if damage == "shorter":
        path.write_text(text[:-30])
    elif damage == "columns":
        path.write_text(text.replace("metric", "metrik"))
    elif damage == "number":
        path.write_text(text.replace(",0.5,", ",x.5,"))
    elif damage == "no pairs":
        (tmp_path / PAIRS).unlink()
    elif damage == "pairs":
        (tmp_path / PAIRS).write_text((tmp_path / PAIRS).read_text().replace(",memory/", ",", 1).replace(",0.5,", ",,"))
    elif damage == "state":
        (tmp_path / SETTINGS).write_text("{")
    else:
        (tmp_path / SETTINGS).unlink()
    with pytest.raises(UserError, match=r"sweep(_pairs)?\.(csv|json): ") as caught:
        SweepTable(tmp_path, sweep.settings)
    assert "\n" not in str(caught.value)
    assert "steering.restart=true" in str(caught.value)


class Absent(DegenerationScorer):
    """A service that is down, and then is there."""

    is_down = True

    def score(self, samples: Sequence[Sample]) -> Scores:
        if self.is_down:
            raise ConnectionError("down")
        return super().score(samples)


@pytest.mark.filterwarnings("ignore:behaviour. absent")
def test_what_could_not_be_scored_is_seen_and_taken_again(asked_about: Checkpoints, tmp_path: Path) -> None:
    absent = Absent()
    sweep = make_small(asked_about, scorers={"absent": absent, "there": Listener()}, lambdas=[1.0])
    table, unfinished = SweepTable(tmp_path, sweep.settings), []
    for unit in sweep.units:
        taken = sweep.rows(unit)
        if taken.missing:
            unfinished.append(taken)
        else:
            table.append(unit, taken)
    table.append_unfinished(unfinished)
    assert [rows.missing for rows in unfinished] == [["absent"]] * 4
    assert len(read_sweep(table.path).query("metric == 'degeneration'")) == 4 * 2, "what there is can be seen"
    absent.is_down = False
    again = SweepTable(tmp_path, sweep.settings)
    assert [unit for unit in sweep.units if unit not in again.finished] == [
        u for u in sweep.units if u.part == "generated"
    ]
    assert "degeneration" not in set(read_sweep(again.path)["metric"]), "and is taken anew"


class Unreachable(DegenerationScorer):
    """A judge that nobody answers for."""

    def start(self) -> None:
        raise UserError("judge: nobody there")


def test_planning_starts_no_scorer_and_starting_does_where_text_is_generated(asked_about: Checkpoints) -> None:
    options = {"scorers": {"judge": Unreachable()}, "vectors": [], "n_random": 1, "sites": "final_post_norm"}
    asked = SteeringSweep(**options)
    assert asked.plan(asked_about).units
    with pytest.raises(UserError, match="nobody there"):
        asked.start(asked_about)
    SteeringSweep(**options, n_generated=0).start(asked_about)


def test_the_section_is_drawn_from_the_tables_alone(swept: SweepTable) -> None:
    folder = swept.folder
    section = steering_section(read_sweep(swept.path), read_pairs(folder / PAIRS), read_settings(folder))
    assert section is not None
    assert_legible(section)
    drawn = {line.get_color() for axes in section.figure.axes for line in axes.lines}
    assert not drawn & {COLOURS[arm] for arm in ("sft_chosen", "dpo_shuffled", "dpo_swapped")}, "a control's colour"
    assert len(section.sentences) == 7
    assert "at λ = 1; the best of 2 random vectors" in section.sentences[0]
    assert re.match(
        r"\d of 4 vectors and sites recover more than random ones when added; v\* at ", section.sentences[1]
    )
    assert section.shown is not None
    assert len(section.shown) == 2 * 2  # v* where it is best, v̄ at its one site, both directions
    assert "steering.controls=[RUN]" in section.limits[-1], "no other training's v* was swept"
    assert set(section.more_tables) == {"steering_effects"}
    assert any("a logit bias, W_U v" in line for line in section.reading)


@pytest.mark.parametrize("vector", [V_STAR, "random_1"])
def test_a_sweep_without_v_star_and_its_controls_yet_is_not_drawn(swept: SweepTable, vector: str) -> None:
    table, pairs = read_sweep(swept.path), read_pairs(swept.folder / PAIRS)
    if vector == "random_1":
        table, pairs = (rows[~rows["vector"].str.startswith("random")] for rows in (table, pairs))
    else:
        table = table[(table["direction"] != "inversion")]
    assert steering_section(table, pairs, read_settings(swept.folder)) is None


def test_the_ceiling_is_the_first_strength_a_tenth_above_the_unsteered() -> None:
    rows = [
        ("interpolation", V_STAR, "layer_00", x, "degeneration", y, y - 0.15, 1.0, 10)
        for x, y in ((-1.0, 0.9), (0.0, 0.1), (1.0, 0.2), (2.0, 0.3), (3.0, 0.9))
    ]
    columns = ["direction", "vector", "site", "lambda", "metric", "value", "ci_low", "ci_high", "n"]
    table = pd.DataFrame(rows, columns=columns)
    assert ceiling(table, "interpolation", V_STAR, "layer_00") == 2.0
    assert ceiling(table[table["lambda"] < 2], "interpolation", V_STAR, "layer_00") is None
    table.loc[table["lambda"] == 0, "value"] = 0.2  # broken anyway: 0.3 is within chance
    assert ceiling(table, "interpolation", V_STAR, "layer_00") == 3.0


def test_zero_is_added_to_a_grid_without_it() -> None:
    asked = SteeringSweep(scorers={}, lambdas=[2.0, 1.0])
    assert asked.lambdas == [0.0, 1.0, 2.0]
    assert [note.partition(":")[0] for note in asked.notes] == ["steering.lambdas"]
    assert not SteeringSweep(scorers={}).notes


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
        ({"position": "response_all"}, "position"),
        ({"tokens": "chosen"}, "tokens"),
        ({"n_directions": 0}, "n_directions"),
        ({"vectors": "v*"}, "vectors"),
        ({"vectors": ["probe", "probe"]}, "vectors"),
        ({"controls": "runs/x"}, "controls"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=rf"^steering\.{key}: expected"):
        SteeringSweep(scorers={}, **options)  # type: ignore[arg-type]


def test_models_that_do_not_differ_have_no_vector() -> None:
    with pytest.raises(UserError, match=r"^aligned: expected a model whose hidden states at layer_00 are not"):
        make(checkpoints(8, base=0, aligned=0))


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="at least 4 prompts"):
        split_by_prompt(checkpoints(3).pairs, seed=0)


def test_settings_are_plain(asked_about: Checkpoints) -> None:
    json.dumps(make(asked_about).settings)
