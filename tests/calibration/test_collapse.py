"""How often text is called collapsed: rarely where steering does nothing to it, nearly always where a third breaks."""

import inspect

import numpy as np
import pytest

from analysis.controls.c15_random_vectors import Text
from analysis.steering.sweep import SteeringSweep
from tests.calibration.coverage import monte_carlo_band
from tiltmeter.stats.paired import more_often

pytestmark = pytest.mark.slow
N_SETS = 500
N_GENERATED = inspect.signature(SteeringSweep).parameters["n_generated"].default


def called_collapsed(steered: float, unsteered: float) -> float:
    """Share of sets in which degenerate completions at these rates are called a collapse."""
    rng, called = np.random.default_rng(0), 0
    for _ in range(N_SETS):
        ones, others = ((rng.random(N_GENERATED) < rate).astype(float) for rate in (steered, unsteered))
        called += Text(ones.mean(), others.mean(), more_often(ones.tolist(), others.tolist())).has_collapsed
    return called / N_SETS


@pytest.mark.parametrize("rate", [0.0, 0.03, 0.2, 0.5])
def test_equal_rates_are_rarely_a_collapse(rate: float) -> None:
    assert called_collapsed(rate, rate) <= monte_carlo_band(0.0, 0.05, n_sets=N_SETS)[1]


def test_a_few_degenerate_completions_are_rarely_a_collapse() -> None:
    assert called_collapsed(0.03, 0.0) <= 0.05


@pytest.mark.parametrize("unsteered", [0.0, 0.03])
def test_a_third_broken_is_found(unsteered: float) -> None:
    assert called_collapsed(0.3, unsteered) >= 0.9
