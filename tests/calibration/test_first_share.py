"""How often the interval of the share in the first tokens holds the truth, among the sets in which it is shown at all."""

import math

import numpy as np
import pytest
import torch

from analysis.behaviour.rewards import SideLogProbs, first_share
from tests.calibration.coverage import monte_carlo_band
from tiltmeter.scoring.depth import FIRST_TOKENS

pytestmark = pytest.mark.slow
TRUTH, N_SETS = 0.3, 200


def pair_of(draw: np.random.Generator, margin: float) -> SideLogProbs:
    """Log-ratios of two responses of one length: noise on every token, and a margin of which the first ones hold their share."""
    length, scale = 20 + int(draw.integers(20)), math.exp(draw.normal(0, 0.5))
    shift = np.full(length, margin * (1 - TRUTH) / 2 / (length - FIRST_TOKENS))
    shift[:FIRST_TOKENS] = margin * TRUTH / 2 / FIRST_TOKENS
    noise = draw.normal(0, 0.35, (2, length))
    return SideLogProbs(
        *(torch.tensor(scale * (side + sign * shift)) for side, sign in zip(noise, (1, -1), strict=True))
    )


@pytest.mark.parametrize("margin", [2.0, 1.0])
@pytest.mark.parametrize("n", [16, 64])
def test_coverage_of_the_share_in_the_first_tokens(n: int, margin: float) -> None:
    draw, groups = np.random.default_rng(0), [str(i) for i in range(n)]
    found = [first_share([pair_of(draw, margin) for _ in range(n)], groups) for _ in range(N_SETS)]
    shown = [interval for interval in found if math.isfinite(interval.low)]
    held = sum(interval.low <= TRUTH <= interval.high for interval in shown)
    low, high = monte_carlo_band(0.93, 0.985, n_sets=len(shown))
    assert low <= held / len(shown) <= high, (held, len(shown))
