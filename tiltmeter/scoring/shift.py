"""Behaviour under shift: the share of what training changed on usual prompts that is there on other ones, too."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tiltmeter.scoring.depth import ratio_of_sums
from tiltmeter.stats.jackknife import NO_INTERVAL, Interval, jackknife_interval


def share_kept(
    shifted: Sequence[float], shifted_groups: Sequence[str], usual: Sequence[float], usual_groups: Sequence[str]
) -> Interval:
    """Mean change under shift over the mean change on usual prompts, with its 95 % interval over prompts.

        kept = (Σ_i s_i / n) / (Σ_j u_j / m)

    1 is all of it, 0 nothing, below 0 the opposite. Prompts of one name are left out together, so that pairs which are in both
    count as pairs. NaN where the change on usual prompts is not told from 0.

    Args:
        shifted, usual: change of each pair, such as of log [P(chosen) / P(rejected)] from base to aligned model, nats.
        shifted_groups, usual_groups: a name for each pair; pairs of one prompt share it, also across both.

    Raises:
        ValueError: lengths that differ, or no pair.

    >>> share_kept([1.0, 1.0, 1.0], ["a", "b", "c"], [2.0, 2.0, 2.0], ["a", "b", "c"]).value
    0.5
    """
    if len(shifted) != len(shifted_groups) or len(usual) != len(usual_groups) or not shifted or not usual:
        raise ValueError(
            f"share_kept: expected a name for each pair, got {len(shifted_groups)} for {len(shifted)} and "
            f"{len(usual_groups)} for {len(usual)}"
        )
    if min(len(set(usual_groups)), len(set(shifted_groups))) < 2:
        return NO_INTERVAL
    before = ratio_of_sums(usual, [1.0] * len(usual), usual_groups)
    if before.low <= 0 <= before.high:
        return NO_INTERVAL
    values = torch.tensor([*shifted, *usual], dtype=torch.float64)
    is_shifted = torch.arange(len(values)) < len(shifted)

    def mean_of(drawn: Tensor, rows: Tensor) -> Tensor:
        return drawn[:, rows] @ values[rows] / drawn[:, rows].sum(1)

    names = [*shifted_groups, *usual_groups]
    return jackknife_interval(lambda drawn: mean_of(drawn, is_shifted) / mean_of(drawn, ~is_shifted), names)
