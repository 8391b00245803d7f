"""Percentile intervals by drawing prompts with replacement; :mod:`tiltmeter.stats.jackknife` says when they are wrong."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tiltmeter.stats.jackknife import Interval as Interval

_WEIGHTS_AT_A_TIME = 4_000_000


def cluster_intervals(
    statistic: Callable[[Float[Tensor, "resample row"]], Float[Tensor, "resample figure"]],
    clusters: Sequence[str],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> list[Interval]:
    """Figures of N rows with percentile bootstrap intervals over whole clusters (prompts).

    For sums and ratios of sums of many prompts alone: too narrow below about 50, and beside the truth for products of rows.

    Args:
        statistic: from how often each row was drawn (float64, on the CPU), for several resamples at once, to a column a figure.
        clusters: N names; rows of equal name are drawn together.

    Returns:
        In the order of the columns; infinite when there is a single cluster. Resamples in which a figure is NaN are left out.

    Raises:
        ValueError: no rows.
    """
    if not len(clusters):
        raise ValueError("expected at least one row, got none")
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    values = statistic(torch.ones(1, len(clusters), dtype=torch.float64))[0].tolist()
    if len(names) < 2:
        return [Interval(value, float("-inf"), float("inf")) for value in values]
    rng = np.random.default_rng(seed)
    at_a_time = max(1, _WEIGHTS_AT_A_TIME // len(clusters))
    found = []
    for start in range(0, n_resamples, at_a_time):
        count = min(at_a_time, n_resamples - start)
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)
        found.append(statistic(torch.from_numpy(drawn[:, index].astype(np.float64))))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(found).to(torch.float64).nanquantile(ends, dim=0).tolist()
    return [Interval(*bounds) for bounds in zip(values, low, high, strict=True)]
