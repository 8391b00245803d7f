import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from tiltmeter.scoring.scorer import Figure
from tiltmeter.scoring.win_rate import win_rate_figures
from tiltmeter.stats.equal_length import LENGTH_EFFECT_VARIANCE, length_controlled

NAN = math.nan
verdict_lists = st.lists(st.sampled_from([1.0, 0.5, 0.0]), min_size=2, max_size=30)


def figures(verdicts: Sequence[float], lengths: Sequence[float] | None = None) -> dict[str, Figure]:
    clusters = [str(i) for i in range(len(verdicts))]
    lengths = [0.0] * len(verdicts) if lengths is None else [float(x) for x in lengths]
    found = win_rate_figures("w", [float(v) for v in verdicts], clusters, lengths, scorer="x")
    return {figure.name: figure for figure in found}


def planted(n: int, *, skill: float, length_effect: float, seed: int = 0) -> tuple[list[float], list[float]]:
    """Verdicts of a judge for whom b₀ = ``skill`` and b₁ = ``length_effect``; the candidate is mostly longer."""
    rng = np.random.default_rng(seed)
    longer = rng.normal(40, 80, n)
    log_odds = skill + length_effect * np.tanh(longer / longer.std())
    return (rng.random(n) < 1 / (1 + np.exp(-log_odds))).astype(float).tolist(), longer.tolist()


def by_scikit_learn(verdicts: Sequence[float], longer: Sequence[float]) -> float:
    """The same model: a tie is a win and a loss of half the weight."""
    y, x = np.asarray(verdicts), np.tanh(np.asarray(longer) / np.std(longer))[:, None]
    both: NDArray[np.float64] = np.concatenate([y, 1 - y])
    labels = np.repeat([1, 0], len(y))
    model = LogisticRegression(C=LENGTH_EFFECT_VARIANCE, tol=1e-12, max_iter=10_000)
    model.fit(np.concatenate([x, x]), labels, sample_weight=both)
    return float(model.predict_proba([[0.0]])[0, 1])


def test_figures_by_hand() -> None:
    found = figures([1, 1, 0.5, 0, NAN, *[1] * 20], [5, 1, 0, -2, 6, *[0] * 20])
    assert found["w"].value == pytest.approx(22.5 / 24)
    assert (found["w_wins"].value, found["w_ties"].value, found["w_losses"].value) == pytest.approx(
        (22 / 24, 1 / 24, 1 / 24)
    )
    assert found["w_length_difference"].value == pytest.approx(10 / 25)
    assert [(f.n, f.n_missing) for f in found.values()] == [(24, 1)] * 5 + [(25, 0)]
    assert {f.of for f in found.values()} == {"both"}


def test_too_much_missing_gives_no_figure_but_counts() -> None:
    found = figures([1] * 9 + [NAN])
    assert math.isnan(found["w"].value)
    assert (found["w"].n, found["w"].n_missing) == (9, 1)
    assert math.isnan(found["w_length_controlled"].value)
    assert found["w_length_difference"].value == 0


def test_nothing_at_all_is_no_figure() -> None:
    assert all(math.isnan(figure.value) and figure.n == 0 for figure in figures([]).values())


@pytest.mark.parametrize("wrong", [0.7, 2.0, -1.0])
def test_a_verdict_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="expected verdicts 1"):
        figures([1.0, wrong])


@settings(max_examples=15)
@given(verdict_lists)
def test_swapping_the_sides_turns_every_figure_round(verdicts: list[float]) -> None:
    lengths = [float((7 * i) % 5 - 2) for i in range(len(verdicts))]
    found, swapped = figures(verdicts, lengths), figures([1 - v for v in verdicts], [-d for d in lengths])
    assert found["w"].value == pytest.approx(1 - swapped["w"].value)
    assert found["w_wins"].value == pytest.approx(swapped["w_losses"].value)
    ours, theirs = found["w_length_controlled"].value, swapped["w_length_controlled"].value
    assert ours == pytest.approx(1 - theirs, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("seed", range(4))
def test_length_control_is_scikit_learns_logistic_regression(seed: int) -> None:
    verdicts, longer = planted(150, skill=0.3, length_effect=1.5, seed=seed)
    verdicts[::7] = [0.5] * len(verdicts[::7])
    ours = length_controlled(verdicts, [str(i) for i in range(150)], longer)
    assert ours.value == pytest.approx(by_scikit_learn(verdicts, longer), abs=1e-6)
    assert ours.low < ours.value < ours.high


def test_a_planted_length_bias_is_taken_out() -> None:
    verdicts, longer = planted(600, skill=0.0, length_effect=2.0)
    clusters = [str(i) for i in range(600)]
    raw = float(np.mean(verdicts))
    ours = length_controlled(verdicts, clusters, longer)
    assert raw > 0.6
    assert ours.low < 0.5 < ours.high
    assert ours.value == pytest.approx(0.5, abs=0.06)


def test_without_a_length_bias_skill_stays() -> None:
    verdicts, longer = planted(600, skill=math.log(3), length_effect=0.0)
    ours = length_controlled(verdicts, [str(i) for i in range(600)], longer)
    assert ours.low < 0.75 < ours.high


def test_equal_lengths_leave_the_win_rate_as_it_is() -> None:
    assert length_controlled([1.0, 1.0, 0.5, 0.0], list("abcd"), [0.0] * 4).value == pytest.approx(0.625)


def test_one_side_always_longer_says_nothing_of_equal_lengths() -> None:
    assert math.isnan(length_controlled([1.0, 0.0, 1.0, 0.0], list("abcd"), [3.0, 4.0, 5.0, 6.0]).value)


def test_all_wins_are_all_wins() -> None:
    ours = length_controlled([1.0] * 6, list("abcdef"), [3.0, -4.0, 5.0, -6.0, 1.0, 2.0])
    assert ours.value == pytest.approx(1, abs=1e-6)


def test_verdicts_on_one_prompt_are_not_independent() -> None:
    verdicts = [1.0, 1.0, 0.0, 0.0] * 10
    alone = win_rate_figures("w", verdicts, [str(i) for i in range(40)], [0.0] * 40, scorer="x")[0]
    paired = win_rate_figures("w", verdicts, [str(i // 2) for i in range(40)], [0.0] * 40, scorer="x")[0]
    assert paired.high - paired.low > 1.2 * (alone.high - alone.low)
