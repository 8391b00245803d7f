"""Tables of sweeps: λ = 0, resuming, settings that changed, damage, what is drawn from them; options that are refused."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from analysis.controls.c15_random_vectors import ceiling
from analysis.figures.fig2_steering import GOALS, decay_of_v_star, steering_section, steering_section_of
from analysis.open.checkpoints import Checkpoints
from analysis.report.style import COLOURS
from analysis.steering.directions import split_by_prompt
from analysis.steering.sweep import SteeringSweep
from analysis.steering.table import (
    CHOOSING,
    COLUMNS,
    PAIRS,
    SETTINGS,
    TABLE,
    VECTORS,
    SweepTable,
    read_pairs,
    read_settings,
    read_sweep,
)
from analysis.steering.vectors import describe
from tests.analysis.asked import checkpoints
from tests.analysis.legible import assert_legible
from tests.analysis.sweeps import Listener, make, make_small, run, values
from tiltmeter.errors import UserError
from tiltmeter.files import write_text
from tiltmeter.models.layers import FINAL_POST_NORM
from tiltmeter.scoring.degeneration import DegenerationScorer
from tiltmeter.scoring.scorer import Sample, Scores
from tiltmeter.steering.vector import V_BAR, V_STAR


@pytest.fixture(scope="module")
def asked_about() -> Checkpoints:
    return checkpoints(8)


@pytest.fixture(scope="module")
def swept(asked_about: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> SweepTable:
    return run(make(asked_about), tmp_path_factory.mktemp("swept"))


def test_unsteered_rows_are_the_same_for_all_vectors(swept: SweepTable) -> None:
    table = read_sweep(swept.path)
    assert set(values(table, "recovery", 0.0)) == {0.0}
    for direction in ("interpolation", "inversion"):
        of = table[(table["direction"] == direction) & (table["lambda"] == 0)]
        for metric in ("kl", "top1_agreement"):
            found = values(of, metric, 0.0)
            assert found == pytest.approx([found[0]] * len(found), rel=1e-6)
    assert set(table["vector"]) == {V_STAR, V_BAR, "random"}
    assert set(table[(table["vector"] == "random") & (table["metric"] == "recovery")]["draw"]) == {1, 2}
    assert set(table[table["vector"] == V_BAR]["site"]) == {FINAL_POST_NORM}
    text = table[(table["metric"] == "degeneration") & (table["vector"] == "random")]
    assert set(text["draw"]) == {0}, "draws share the prompts"


def test_a_sweep_that_was_stopped_goes_on_to_the_same_table(asked_about: Checkpoints, tmp_path: Path) -> None:
    whole = run(make_small(asked_about), tmp_path / "whole")
    run(make_small(asked_about), tmp_path / "parts", n_units=4)
    with (tmp_path / "parts" / "sweep.csv").open("a") as file:
        file.write("interpolation,v*,0,layer_00,0.5,reco")  # the process ended while it wrote
    with (tmp_path / "parts" / PAIRS).open("a") as file:
        file.write("interpolation,v*,0,layer_00,0.5,2.5,memory/3,ab")
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


def test_table_without_the_operator_column_is_gone_on_with(asked_about: Checkpoints, tmp_path: Path) -> None:
    """As sweeps wrote it while adding was all that they did."""
    sweep = make_small(asked_about)
    run(sweep, tmp_path, n_units=3)
    table, state = tmp_path / TABLE, tmp_path / SETTINGS
    whole, known = table.read_bytes(), json.loads(state.read_text())
    old = b"".join(line.rpartition(b",")[0] + b"\n" for line in whole.splitlines())
    table.write_bytes(old)
    del known["settings"]["operator"]
    state.write_text(json.dumps(known | {"bytes": known["bytes"] | {TABLE: len(old)}}))
    assert set(read_sweep(table)["operator"]) == {"add"}
    assert len(SweepTable(tmp_path, sweep.settings).finished) == 3
    assert table.read_bytes() == whole
    assert json.loads(state.read_text())["bytes"][TABLE] == len(whole)
    with pytest.raises(UserError, match="was begun with operator=add, now it is rotate"):
        SweepTable(tmp_path, make_small(asked_about, operator="rotate").settings)


def test_section_under_an_operator_says_what_was_done(asked_about: Checkpoints, tmp_path: Path) -> None:
    sweep = make_small(asked_about, operator="project_out", n_generated=0)
    folder = run(sweep, tmp_path).folder
    write_text(folder / VECTORS, describe(sweep.made).to_csv(index=False))
    section = steering_section_of(folder)
    assert section is not None
    said = [*section.sentences, *section.reading]
    assert any(line.startswith("v* projected out at ") for line in said)
    assert not any("Adding v*" in line or "is added" in line for line in said)
    assert any("λ is the share of what a state has along a vector" in line for line in said)


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
    section = steering_section(
        read_sweep(swept.path), read_pairs(folder / PAIRS), read_settings(folder), pd.DataFrame()
    )
    assert section is not None
    assert_legible(section)
    drawn = {line.get_color() for axes in section.figure.axes for line in axes.lines}
    assert not drawn & {COLOURS[arm] for arm in ("sft_chosen", "dpo_shuffled", "dpo_swapped")}, "a control's colour"
    assert len(section.sentences) == 7
    assert "at λ = 1; 95\u00a0% of random vectors there " in section.sentences[0]
    assert re.match(
        r"\d of 4 vectors and sites recover more than random ones when added; v\* at ", section.sentences[1]
    )
    assert section.shown is not None
    assert len(section.shown) == 2 * 2  # v* where it is best, v̄ at its one site, both directions
    assert "steering.controls=[RUN]" in section.limits[-1], "no other training's v* was swept"
    assert set(section.more_tables) == {"steering_effects", "steering_decay"}
    decay = section.more_tables["steering_decay"]
    assert len(decay) == 2 * 3 * 2, "directions, sites, metrics"
    assert decay["reason"].str.contains("expected more than").all(), "four strengths are too few"
    assert any("a logit bias, W_U v" in line for line in section.reading)


@pytest.mark.parametrize("vector", [V_STAR, "random"])
def test_a_sweep_without_v_star_and_its_controls_yet_is_not_drawn(swept: SweepTable, vector: str) -> None:
    table, pairs = read_sweep(swept.path), read_pairs(swept.folder / PAIRS)
    if vector == "random":
        table, pairs = (rows[~rows["vector"].str.startswith("random")] for rows in (table, pairs))
    else:
        table = table[(table["direction"] != "inversion")]
    assert steering_section(table, pairs, read_settings(swept.folder), pd.DataFrame()) is None


def test_planted_decay_is_found_at_its_half() -> None:
    """PrefOdds = (2 λ + 1) D(λ), D = 1 / (1 + (λ − 0.5)² / 2) beyond 0.5, so that D = ½ at 0.5 + √2."""
    strengths = [0.25 * i for i in range(25)]
    decay = [1 / (1 + max(x - 0.5, 0) ** 2 / 2) for x in strengths]
    odds = {"preference_odds": [(2 * x + 1) * d for x, d in zip(strengths, decay, strict=True)]}
    odds["utility_odds"] = [3 * d for d in decay]
    known = [
        (1.0, CHOOSING, 0.5),
        *((x, name, y) for name, ys in odds.items() for x, y in zip(strengths, ys, strict=True)),
    ]
    rows = [(d, V_STAR, 0, "layer_00", x, name, y, math.nan, math.nan, 9, "add") for d in GOALS for x, name, y in known]
    found = decay_of_v_star(pd.DataFrame(rows, columns=list(COLUMNS)))
    assert len(found) == 4
    assert found["half_plus"].tolist() == pytest.approx([0.5 + math.sqrt(2)] * 4, rel=1e-3)
    assert found["half_minus"].isna().all(), "no strength below 0"


def test_the_ceiling_is_the_first_strength_a_tenth_above_the_unsteered() -> None:
    rows = [
        ("interpolation", V_STAR, 0, "layer_00", x, metric, value, math.nan, math.nan, 64, "add")
        for x, y, p in ((-1.0, 0.9, 0.0), (0.0, 0.1, 1.0), (1.0, 0.2, 0.01), (2.0, 0.3, 0.01), (3.0, 0.9, 0.0))
        for metric, value in (("degeneration", y), ("degeneration_p", p))
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    assert ceiling(table, "interpolation", V_STAR, "layer_00") == 2.0
    assert ceiling(table[table["lambda"] < 2], "interpolation", V_STAR, "layer_00") is None
    table.loc[(table["lambda"] == 2) & (table["metric"] == "degeneration_p"), "value"] = 0.2
    assert ceiling(table, "interpolation", V_STAR, "layer_00") == 3.0, "what chance may do is no collapse"


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
        ({"operator": "ablate"}, "operator"),
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
