"""Effects against random vectors by a plain loop over resamples; verdicts on planted effects; equal KL; collapsed text."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student_t

from analysis.controls.c15_random_vectors import (
    ABOVE,
    BELOW,
    COLLAPSED,
    CONTROLS_COLLAPSED,
    EQUAL_KL,
    EQUAL_NORM,
    SAME,
    UNKNOWN,
    UTILITY,
    cell_of,
    compare,
    draw_effects,
    interpolate,
    steering_effects,
)
from analysis.report.style import new_figure
from analysis.steering.table import COLUMNS, PAIR_COLUMNS
from benchmarks.random_vectors import random_among_random

LAMBDAS = (-1.0, 0.0, 1.0, 2.0)
N = 40


def planted(
    *, better: float = 0.0, moves: float = 1.0, harms: float = 0.0, n_random: int = 4, seed: int = 0
) -> pd.DataFrame:
    """A vector whose KL to the goal is lower by a share of the start's than random ones', and its margin higher, in nats.

    Chosen responses of ten tokens lose λ nats under random vectors, and so many more under it.
    """
    rng = np.random.default_rng(seed)
    difficulty = rng.uniform(5, 50, N)  # of a pair, shared by all vectors
    rows = []
    for draw in range(n_random + 1):
        name = "random" if draw else "v*"
        own, pace = (0.0, 1.0) if draw else (better, moves)
        noise = rng.normal(0, 0.02, N)
        for strength in LAMBDAS:
            kl = difficulty * (1 - strength * (0.1 + own + noise))
            odds = difficulty + strength * (1 + 10 * own + noise)
            away = (pace * strength) ** 2 * np.ones(N)
            said = -difficulty - strength * (1 + (0 if draw else harms) + noise)
            where = "interpolation", name, draw, "layer_00"
            pairs = zip(kl, away, odds, said, strict=True)
            rows += [(*where, strength, strength, f"p{i}", f"g{i // 2}", 10, *of) for i, of in enumerate(pairs)]
    return pd.DataFrame(rows, columns=list(PAIR_COLUMNS))


def text(share: float, *, unsteered: float = 0.0, p: float = 0.001, of: str = "v*") -> pd.DataFrame:
    """Shares of degenerate completions, and the p-value of the exact test."""
    found = [(0.0, "degeneration", unsteered), (1.0, "degeneration", share), (1.0, "degeneration_p", p)]
    rows = [
        ("interpolation", of, 0, "layer_00", strength, metric, value, math.nan, math.nan, 64, "add")
        for strength, metric, value in found
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def one(effects: pd.DataFrame, metric: str = "recovery", equal: str = EQUAL_NORM) -> pd.Series:
    """The one row of a comparison."""
    (row,) = effects[(effects["metric"] == metric) & (effects["equal"] == equal)].to_dict("records")
    return pd.Series(row)


@pytest.mark.parametrize(("better", "verdict"), [(0.1, ABOVE), (-0.1, BELOW)])
def test_a_planted_effect_is_found(better: float, verdict: str) -> None:
    effects = steering_effects(planted(better=better), text(0.0), strength=1.0)
    found = one(effects)
    assert found["verdict"] == verdict
    assert found["difference"] == pytest.approx(better, abs=0.02)
    assert (found["n_controls"], found["n"]) == (4, N)
    assert found["control_low"] <= found["control_mean"] <= found["control_high"]
    margin = one(effects, "preference_odds")
    assert margin["difference"] == pytest.approx(10 * better, abs=0.02)


def test_a_comparison_has_effect_null_and_the_interval_between_them() -> None:
    cell = cell_of(planted(better=0.1))
    found, reached = compare(cell, "v*", "random", "recovery", EQUAL_NORM, 1.0)
    row = one(steering_effects(planted(better=0.1), text(0.0), strength=1.0))
    assert (found.effect, found.null, found.verdict) == (row["value"], row["control_mean"], row["verdict"])
    assert found.interval == (row["difference"], row["ci_low"], row["ci_high"])
    assert found.interval.value == pytest.approx(found.effect - found.null)
    assert reached == row["kl_from_start"]
    screened, _ = compare(cell, "v*", "random", "recovery", EQUAL_NORM, 1.0, screened=COLLAPSED)
    assert (screened.effect, screened.verdict) == (found.effect, COLLAPSED)
    assert all(map(math.isnan, screened.interval))


def test_where_there_is_no_effect_most_are_not_distinguishable() -> None:
    """The error rate itself is that of tests/calibration."""
    verdicts = [one(steering_effects(planted(seed=seed), text(0.0), strength=1.0))["verdict"] for seed in range(12)]
    assert verdicts.count(SAME) >= 9


def test_the_interval_is_the_wider_of_a_further_draws_and_a_loop_over_resamples() -> None:
    """Whole prompts are drawn, the same for the vector and its controls; R is a ratio of sums."""
    pairs = planted(better=0.01)
    found = one(steering_effects(pairs, text(0.0), strength=1.0))
    by = {key: part["kl"].to_numpy() for key, part in pairs.groupby(["draw", "lambda"])}
    prompts = pairs.drop_duplicates("pair_id")["prompt"].to_numpy()
    members = [np.flatnonzero(prompts == prompt) for prompt in np.unique(prompts)]
    rng = np.random.default_rng(5)

    def recoveries(drawn: list[int]) -> np.ndarray:
        start = by[0, 0.0][drawn].sum()
        return np.array([1 - by[draw, 1.0][drawn].sum() / start for draw in range(5)])

    def difference(drawn: list[int]) -> float:
        own, *random = recoveries(drawn)
        return float(own - np.mean(random))

    draws = [
        difference([int(pair) for i in rng.integers(len(members), size=len(members)) for pair in members[i]])
        for _ in range(600)
    ]
    own, *random = recoveries(list(range(N)))
    reach = student_t.ppf(0.975, 3) * np.std(random, ddof=1) * math.sqrt(1 + 1 / 4)
    middle = own - np.mean(random)
    assert found["difference"] == pytest.approx(middle)
    low, high = np.quantile(draws, [0.025, 0.975])
    width = high - low
    assert found["ci_low"] == pytest.approx(min(low, middle - reach), abs=0.15 * width)
    assert found["ci_high"] == pytest.approx(max(high, middle + reach), abs=0.15 * width)
    assert (found["prediction_low"], found["prediction_high"]) == pytest.approx(
        (np.mean(random) - reach, np.mean(random) + reach)
    )
    rank = 1 + sum(x >= own for x in random)
    assert found["p_above"] == pytest.approx(rank / 5)


def test_at_equal_kl_a_vector_that_moves_less_is_compared_with_shorter_random_ones() -> None:
    """v moves the model half as far, (λ/2)²: random ones, whose KL is λ², get there at λ = ½, where they gain half as much."""
    effects = steering_effects(planted(moves=0.5), text(0.0), strength=1.0)
    found, at_norm = one(effects, "preference_odds", EQUAL_KL), one(effects, "preference_odds")
    assert found["control_mean"] == pytest.approx(0.5 * at_norm["control_mean"])
    assert found["value"] == pytest.approx(at_norm["value"])
    assert found["verdict"] == ABOVE
    assert found["difference"] > 10 * abs(at_norm["difference"])


def test_what_random_vectors_never_reach_is_compared_where_they_get_to() -> None:
    """v moves the model 81 times as far as they do at λ = 1, they get to 4 at λ = 2: v is there at λ = √(4 / 81)."""
    effects = steering_effects(planted(moves=9.0), text(0.0), strength=1.0)
    found, at_norm = one(effects, "preference_odds", EQUAL_KL), one(effects, "preference_odds")
    assert found["value"] == pytest.approx(2 / 9 * at_norm["value"])
    assert found["control_mean"] == pytest.approx(2 * at_norm["control_mean"], rel=1e-6)
    assert found["kl_from_start"] == pytest.approx(4 / 10)
    assert at_norm["kl_from_start"] == pytest.approx(81 / 10)
    assert found["verdict"] == BELOW


@pytest.mark.parametrize(("harms", "verdict"), [(0.0, ABOVE), (-0.5, SAME), (-0.9, BELOW)])
def test_harm_beyond_two_is_compared_where_all_moved_the_model_as_far(harms: float, verdict: str) -> None:
    effects = steering_effects(planted(harms=harms, moves=0.5), text(0.9), strength=1.0)
    found = one(effects, UTILITY, EQUAL_KL)
    assert (found["lambda"], found["verdict"]) == (2.0, verdict), "text that fell apart is what is asked about"
    # moved half as far at λ = 2 as random ones, it is held against them at λ = 1: 2 (1 + harms) and 1 nat, of ten tokens
    assert (found["value"], found["control_mean"]) == pytest.approx((0.2 * (1 + harms), 0.1), abs=0.01)


def test_what_is_not_known_has_no_verdict() -> None:
    pairs = planted()
    pairs.loc[(pairs["vector"] == "v*") & (pairs["lambda"] == 1), "kl"] = math.nan
    found = one(steering_effects(pairs, text(0.0), strength=1.0))
    assert found["verdict"] == UNKNOWN
    assert math.isnan(found["difference"])


@pytest.mark.parametrize(
    ("share", "unsteered", "verdict"),
    [(0.125, 0.0, COLLAPSED), (0.1, 0.0, ABOVE), (0.8, 0.5, COLLAPSED)],
)
def test_broken_text_is_marked_and_not_compared(share: float, unsteered: float, verdict: str) -> None:
    found = one(steering_effects(planted(better=0.2), text(share, unsteered=unsteered), strength=1.0))
    by_chance = steering_effects(planted(better=0.2), text(share, unsteered=unsteered, p=0.06), strength=1.0)
    assert one(by_chance)["verdict"] == ABOVE
    assert found["verdict"] == verdict
    assert math.isnan(found["ci_low"]) == (verdict == COLLAPSED)
    assert (found["degeneration"], found["degeneration_unsteered"]) == (share, unsteered)


def test_controls_whose_text_collapsed_are_compared_at_equal_kl_alone() -> None:
    broken = pd.concat([text(0.0), text(0.5, of="random")])
    effects = steering_effects(planted(better=0.2), broken, strength=1.0)
    assert one(effects)["verdict"] == CONTROLS_COLLAPSED
    assert math.isnan(one(effects)["ci_low"])
    assert one(effects, "preference_odds", EQUAL_KL)["verdict"] == ABOVE


def test_vectors_without_text_are_compared() -> None:
    found = one(steering_effects(planted(better=0.2), text(0.0).iloc[:0], strength=1.0))
    assert found["verdict"] == ABOVE
    assert math.isnan(found["degeneration"])


@pytest.mark.parametrize(
    ("better", "share", "mark", "said"),
    [
        (0.1, 0.0, "o", r"^1 of 1 vectors .* when added; v\* at layer 0: \+0\.1\d \(.*\), above random$"),
        (-4.0, 0.0, "<", r"^0 of 1 .*; v\* at layer 0: −3\.9\d \(.*\), below random$"),
        (0.1, 0.5, "x", r"^0 of 1 .*; v\* at layer 0: collapsed$"),
    ],
)
def test_the_panel_shows_what_is_off_it_and_what_collapsed(better: float, share: float, mark: str, said: str) -> None:
    effects = steering_effects(planted(better=better), text(share), strength=1.0)
    _, (axes,) = new_figure(1)
    sentence = draw_effects(
        axes, effects, direction="interpolation", sites=["layer_00"], site="layer_00", labels={}, how="added"
    )
    assert re.search(said, sentence)
    assert mark in {line.get_marker() for line in axes.lines}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["v*"]


@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=6), st.floats(0.0, 12.0))
def test_interpolation_is_numpys_where_curves_grow(steps: list[float], at: float) -> None:
    x = np.concatenate([[0.0], np.cumsum(steps)])
    y = np.sin(x)
    found = float(interpolate(torch.tensor(x)[None], torch.tensor(y)[None], torch.tensor([at], dtype=torch.float64)))
    assert math.isnan(found) if at > x[-1] else found == pytest.approx(float(np.interp(at, x, y)), abs=1e-12)


def test_each_random_vector_is_judged_as_a_vector_of_a_run_is() -> None:
    pairs = planted(n_random=3)
    pairs = pairs[pairs["lambda"].isin((0.0, 1.0))]
    pairs.loc[(pairs["vector"] == "random") & (pairs["draw"] == 1) & (pairs["lambda"] > 0), "kl"] *= 0.5
    found = random_among_random(pairs).set_index(["metric", "equal", "lambda"])
    called: dict[tuple[str, str, float], list[str]] = {}
    drawn = pairs[pairs["vector"] == "random"]
    for draw in sorted(drawn["draw"].unique()):
        asked = drawn.assign(vector=drawn["vector"].where(drawn["draw"] != draw, "v*"))
        for row in steering_effects(asked, text(0.0), strength=1.0).itertuples():
            called.setdefault((row.metric, row.equal, 1.0), []).append(row.verdict)
    assert set(found.index) == set(called)
    for key, verdicts in called.items():
        shares = [verdicts.count(side) / len(verdicts) for side in (ABOVE, BELOW)]
        assert found.loc[key, ["above", "below"]].tolist() == shares, key
    assert found["above"].max() > 0, "else this test could not fail"
