"""Percentile intervals by drawing prompts with replacement; :mod:`tiltmeter.stats.jackknife` says when they are wrong."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tiltmeter.stats.jackknife import Interval

_WEIGHTS_AT_A_TIME = 4_000_000


def percentile_interval(figure: Float[Tensor, " resample"], *, level: float = 0.95) -> Interval:
    """A figure's value with its percentile interval, from :func:`prompt_resamples`; infinite where there are no resamples."""
    value = float(figure[0])
    if len(figure) < 2:
        return Interval(value, float("-inf"), float("inf"))
    low, high = figure[1:].nanquantile(figure.new_tensor([(1 - level) / 2, (1 + level) / 2])).tolist()
    return Interval(value, low, high)


def prompt_resamples(
    statistic: Callable[[Float[Tensor, "resample row"]], Float[Tensor, "resample figure"]],
    clusters: Sequence[str],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Float[Tensor, "resample figure"]:
    """Figures of all rows, and behind them those of each resample of whole clusters (prompts), in float64.

    Args:
        statistic: from how often each row was drawn (float64, on the CPU), for several resamples at once, to a column a figure.
        clusters: N names; rows of equal name are drawn together.

    Returns:
        ``1 + n_resamples`` rows, the first one of all rows as they are; that one alone where there is a single cluster.

    Raises:
        ValueError: no rows.
    """
    if not len(clusters):
        raise ValueError("expected at least one row, got none")
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    found = [statistic(torch.ones(1, len(clusters), dtype=torch.float64))]
    rng = np.random.default_rng(seed)
    at_a_time = max(1, _WEIGHTS_AT_A_TIME // len(clusters))
    for start in range(0, n_resamples if len(names) > 1 else 0, at_a_time):
        count = min(at_a_time, n_resamples - start)
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)
        found.append(statistic(torch.from_numpy(drawn[:, index].astype(np.float64))))
    return torch.cat(found).to(torch.float64)
