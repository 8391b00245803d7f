"""The decay of log-odds: planted curves are found again, and what can't be fitted says why."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiltmeter.scoring import odds as odds_module
from tiltmeter.scoring.odds import DecayFit, fit_decay

SWEEP = np.linspace(-4, 6, 41)


def decay(m: float, plus: tuple[float, float, float], minus: tuple[float, float, float]) -> float:
    begins, length, power = plus if m > 0 else minus
    beyond = max(0.0, m - begins) if m > 0 else min(0.0, m - begins)
    return (1 + beyond**2 / length) ** -power


PLUS, MINUS = (1.0, 2.0, 1.5), (-0.5, 1.0, 0.8)


def numbers(found: DecayFit) -> list[float]:
    return [*found.plus, *found.minus, *found[2:6]]


def test_a_planted_utility_curve_is_found_again() -> None:
    odds = [5 * decay(m, PLUS, MINUS) - 7 for m in SWEEP]
    found = fit_decay(SWEEP.tolist(), odds, kind="utility")
    assert (found.reason, found.slope, found.n) == ("", 0.0, 41)
    assert (found.level, found.floor, found.r_squared) == pytest.approx((5, -7, 1), rel=1e-4)
    assert found.plus[:3] == pytest.approx(PLUS, rel=1e-3)
    assert found.minus[:3] == pytest.approx(MINUS, rel=1e-3)
    for branch, sides in ((found.plus, PLUS), (found.minus, MINUS)):
        assert decay(branch.half, sides, sides) == pytest.approx(0.5, rel=1e-3)


def test_a_planted_preference_curve_with_a_slope_is_found_again_on_one_side() -> None:
    sweep = np.linspace(0, 6, 31)
    odds = [(2 * m + 0.5) * decay(m, PLUS, MINUS) + 1 for m in sweep]
    found = fit_decay(sweep.tolist(), odds, kind="preference")
    assert (found.slope, found.level, found.floor) == pytest.approx((2, 0.5, 1), rel=1e-3)
    assert found.plus[:3] == pytest.approx(PLUS, rel=1e-2)
    assert all(math.isnan(x) for x in found.minus), "nothing was steered that way"


@settings(max_examples=8)
@given(st.floats(0.01, 100), st.floats(0.1, 30))
def test_units_of_strength_and_odds_only_rescale(unit: float, size: float) -> None:
    odds = np.array([5 * decay(m, PLUS, MINUS) - 7 for m in SWEEP])
    found = fit_decay((unit * SWEEP).tolist(), (size * odds).tolist(), kind="utility")
    assert found.plus.half / unit == pytest.approx(1 + math.sqrt(2 * (2 ** (1 / 1.5) - 1)), rel=1e-3)
    assert found.level / size == pytest.approx(5, rel=1e-3)


def test_noise_leaves_the_half_where_it_is() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, len(SWEEP))
    odds = np.array([5 * decay(m, PLUS, MINUS) - 7 for m in SWEEP]) + noise
    found = fit_decay(SWEEP.tolist(), odds.tolist(), kind="utility")
    assert found.plus.half == pytest.approx(1 + math.sqrt(2 * (2 ** (1 / 1.5) - 1)), rel=0.1)
    assert 0.98 < found.r_squared < 1


def test_a_half_beyond_the_sweep_is_not_extrapolated() -> None:
    sweep = np.linspace(0, 1.8, 20)
    found = fit_decay(sweep.tolist(), [5 * decay(m, PLUS, MINUS) - 7 for m in sweep], kind="utility")
    assert found.reason == ""
    assert math.isnan(found.plus.half) or found.plus.half <= 1.8


def test_missing_points_are_left_out_and_counted() -> None:
    odds = [5 * decay(m, PLUS, MINUS) - 7 for m in SWEEP]
    odds[3] = math.nan
    odds[-1] = -math.inf
    found = fit_decay(SWEEP.tolist(), odds, kind="utility")
    assert found.n == 39
    assert found.level == pytest.approx(5, rel=1e-3)


@pytest.mark.parametrize(
    ("strengths", "odds", "reason"),
    [
        ([], [], "expected more than 2 strengths, one a parameter, and 3 on each side that was swept, got 0"),
        ([0, 1, 2, 3, 4], [1, 1, 0, 0, 0], "expected more than 5 strengths, one a parameter"),
        ([0] * 30, list(range(30)), "got 1"),
        ([-1, 0, 1, 2, 3, 4, 5, 6, 7, 8], list(range(10)), "3 on each side that was swept, got 10"),
        (list(range(20)), [3] * 20, "do not change along the sweep"),
        (list(range(20)), [math.nan] * 20, "got 0"),
        (list(range(20)), [1 - 1 / (1 + m * m) for m in range(20)], "grows along the sweep"),
    ],
)
def test_what_cannot_be_fitted_is_nan_with_a_reason(strengths: list[int], odds: list[float], reason: str) -> None:
    found = fit_decay([float(m) for m in strengths], [float(y) for y in odds], kind="utility")
    assert reason in found.reason
    assert all(math.isnan(x) for x in numbers(found))


def test_a_search_that_does_not_converge_gives_nan_and_what_scipy_said(monkeypatch: pytest.MonkeyPatch) -> None:
    search = odds_module.least_squares

    def impatient(*args: Any, **kwargs: Any) -> Any:
        return search(*args, **kwargs, max_nfev=1)

    monkeypatch.setattr(odds_module, "least_squares", impatient)
    found = fit_decay(SWEEP.tolist(), [5 * decay(m, PLUS, MINUS) - 7 for m in SWEEP], kind="utility")
    assert "did not converge: The maximum number of function evaluations" in found.reason
    assert all(math.isnan(x) for x in numbers(found))


def test_lengths_must_match() -> None:
    with pytest.raises(ValueError, match="as many strengths as odds, got 1 and 2"):
        fit_decay([1.0], [1.0, 2.0], kind="preference")
