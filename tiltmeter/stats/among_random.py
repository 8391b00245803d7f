"""Is one vector unusual among random ones? The one judgement behind every "above random" (control C15).

Random vectors are a sample: that v beats the mean of five of them says nothing about a sixth. So v is held against their
*distribution*:

- the rank of v among n draws, p = (1 + #{T_r ≥ T_v}) / (1 + n): exact where v is one more draw, whatever the distribution;
- the prediction interval of a further draw, mean ± t_{n−1} · s · √(1 + 1/n): it holds for normal T and any n;
- the jackknife interval of T_v − mean over prompts: that v differs on these prompts has to hold for others.

v is called above (or below) random where all three say so at 2.5 % on that side; tests/calibration holds the error rate.
"""

import math
from typing import Literal, NamedTuple, get_args

from jaxtyping import Float
from scipy.special import stdtrit
from torch import Tensor

from tiltmeter.stats.jackknife import NO_INTERVAL, Interval, jackknife_variance

Verdict = Literal["above random", "below random", "not distinguishable", "no value"]
ABOVE, BELOW, SAME, UNKNOWN = get_args(Verdict)


class AmongRandom(NamedTuple):
    """A figure of one vector beside the same figure of random ones."""

    value: float
    random_mean: float
    random_low: float
    """Least value of the draws."""
    random_high: float
    """Largest value of the draws."""
    n_random: int
    """Draws that have a value."""
    prediction: Interval
    """Mean of the draws, and the interval that a further draw lies in."""
    difference: Interval
    """Value less the draws' mean; the wider of the prediction interval and that over prompts."""
    p_above: float
    """(1 + #{draws ≥ value}) / (1 + draws)."""
    p_below: float
    verdict: Verdict


def among_random(
    own: Float[Tensor, " kept"], random: Float[Tensor, "kept draw"], *, level: float = 0.95
) -> AmongRandom:
    """Judge a vector's figure against that of random vectors, on the same prompts.

    Args:
        own: the vector's figure, first on all prompts, then without each of them
            (:func:`tiltmeter.stats.jackknife.without_each`); a single row leaves the prompts out.
        random: the same of each draw.
        level: of the intervals; half of what is left is the error rate of each side.

    Returns:
        Draws without a value are left out; with fewer than two, or no value of the vector itself, there is no verdict. With fewer
        than 2/(1 − level) − 1 draws (39 at 95 %) no rank is that rare, and a vector has to be beyond all of them.

    >>> import torch
    >>> draws = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    >>> [among_random(torch.tensor([x], dtype=torch.float64), draws).verdict for x in (4.5, 9.0)]
    ['not distinguishable', 'above random']
    """
    tail = (1 - level) / 2
    drawn = random[:, random[0].isfinite()]
    value, n = float(own[0]), drawn.shape[1]
    if n < 2 or not math.isfinite(value):
        low, high = (float(drawn[0].min()), float(drawn[0].max())) if n else (math.nan, math.nan)
        mean = float(drawn[0].mean()) if n else math.nan
        return AmongRandom(value, mean, low, high, n, NO_INTERVAL, NO_INTERVAL, math.nan, math.nan, UNKNOWN)
    mean, spread = float(drawn[0].mean()), float(drawn[0].std())
    reach = float(stdtrit(n - 1, 1 - tail)) * spread * math.sqrt(1 + 1 / n)
    prediction = Interval(mean, mean - reach, mean + reach)
    difference, n_prompts = own - drawn.mean(1), len(own) - 1
    if n_prompts > 1:
        variance = float(jackknife_variance(difference[1:]))
        reach = max(reach, float(stdtrit(n_prompts - 1, 1 - tail)) * math.sqrt(variance))
    p_above = (1 + int((drawn[0] >= value).sum())) / (1 + n)
    p_below = (1 + int((drawn[0] <= value).sum())) / (1 + n)
    rarest = max(tail, 1 / (1 + n))
    apart = Interval(float(difference[0]), float(difference[0]) - reach, float(difference[0]) + reach)
    is_above, is_below = apart.low > 0 and p_above <= rarest, apart.high < 0 and p_below <= rarest
    return AmongRandom(
        value,
        mean,
        float(drawn[0].min()),
        float(drawn[0].max()),
        n,
        prediction,
        apart,
        p_above,
        p_below,
        ABOVE if is_above else BELOW if is_below else SAME,
    )
