"""One figure against a handful of random draws of it: where one more draw would lie."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t

from tiltmeter.stats.bootstrap import Interval


def prediction_interval(draws: Sequence[float], *, level: float = 0.95) -> Interval:
    """Where one more draw lies with the given probability: mean ± t · s · √(1 + 1/n), n − 1 degrees of freedom.

    Exact for independent normal draws; ``value`` is their mean. NaN ends for fewer than two draws, NaN draws are left out.

    >>> [round(x, 3) for x in prediction_interval([1.0, 2.0, 3.0])]
    [2.0, -2.968, 6.968]
    """
    known = np.asarray([x for x in draws if x == x])
    if len(known) < 2:
        return Interval(float(known.mean()) if len(known) else math.nan, math.nan, math.nan)
    reach = float(t.ppf((1 + level) / 2, len(known) - 1) * known.std(ddof=1) * math.sqrt(1 + 1 / len(known)))
    mean = float(known.mean())
    return Interval(mean, mean - reach, mean + reach)
