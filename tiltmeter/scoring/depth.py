"""Depth of a change along responses: divergence by token, its share in the first tokens, recovery by token, preference left.

Alignment that changes little beyond the first tokens of a response is undone by forcing a few of them (Qi et al., "Safety
Alignment Should Be Made More Than Just a Few Tokens Deep", arXiv 2406.05946).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tiltmeter.stats.jackknife import LINEAR, LOG_ODDS, NO_INTERVAL, Interval, Scale, jackknife_interval

FIRST_TOKENS = 5
"""Tokens of a response that are called its first."""
_ROUNDING = float(torch.finfo(torch.float32).eps)
"""Nats a token below which two models are called the same."""


class AtToken(NamedTuple):
    """A figure of one token of a response."""

    token: int
    """From 1."""
    figure: Interval
    n: int
    """Responses that are so long."""


def mean_by_token(values: Sequence[Float[Tensor, " _"]], groups: Sequence[str]) -> list[AtToken]:
    """Mean of a quantity at each token over the responses that reach it, in its own unit, with 95 % intervals over prompts.

    Tokens that responses of fewer than two prompts reach are left out.

    Args:
        values: one a token of each response, such as KL(π ‖ π₀) in nats.
        groups: a name for each response; responses to one prompt share it.

    Raises:
        ValueError: lengths that differ.

    >>> found = mean_by_token([torch.tensor([2.0, 1.0]), torch.tensor([4.0])], ["a", "b"])
    >>> [(at.token, at.figure.value, at.n) for at in found]
    [(1, 3.0, 2)]
    """
    return ratio_by_token(values, [torch.ones_like(of) for of in values], groups)


def recovery_by_token(
    kl_steered: Sequence[Float[Tensor, " _"]], kl_start: Sequence[Float[Tensor, " _"]], groups: Sequence[str]
) -> list[AtToken]:
    """Recovery R_t = 1 − Σ KL(π ‖ steered) / Σ KL(π ‖ start) at each token of the responses, with 95 % intervals over prompts.

    NaN at tokens where goal and start are the same up to rounding. R over all tokens: :mod:`tiltmeter.steering.recovery`.

    Args:
        kl_steered, kl_start: nats a token, of each response.
        groups: a name for each response; responses to one prompt share it.

    Raises:
        ValueError: lengths that differ.
    """
    return [
        AtToken(at.token, Interval(1 - at.figure.value, 1 - at.figure.high, 1 - at.figure.low), at.n)
        for at in ratio_by_token(kl_steered, kl_start, groups)
    ]


def first_token_share(
    kl: Sequence[Float[Tensor, " _"]], groups: Sequence[str], *, n_first: int = FIRST_TOKENS
) -> Interval:
    """Share of the summed divergence that lies in the first tokens of the responses, 0 … 1, with its 95 % interval over prompts.

        Σ_responses Σ_{t ≤ n} KL_t / Σ_responses Σ_t KL_t

    Compare with :func:`even_share`: short responses have much of everything in their first tokens. NaN where the models are the
    same up to rounding; symmetric in its log-odds.

    Args:
        kl: KL(π ‖ π₀) in nats at each token of each response; rounding below 0 counts as 0.
        groups: a name for each response; responses to one prompt share it.
        n_first: tokens that are the first.

    Raises:
        ValueError: lengths that differ, or no response.

    >>> share = first_token_share([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])], ["a", "b"], n_first=1)
    >>> share.value
    0.625
    """
    clean = [of.double().clamp(min=0) for of in kl]
    first, whole = [float(of[:n_first].sum()) for of in clean], [float(of.sum()) for of in clean]
    if sum(whole) <= _ROUNDING * sum(map(len, clean)):
        return NO_INTERVAL
    return ratio_of_sums(first, whole, groups, scale=LOG_ODDS)


def even_share(n_tokens: Sequence[int], *, n_first: int = FIRST_TOKENS) -> float:
    """Share of all tokens that are among the first of their response: the share of a divergence that is the same at every token.

    >>> even_share([2, 8], n_first=3)
    0.5
    """
    return sum(min(n, n_first) for n in n_tokens) / sum(n_tokens)


def preference_left(change_after: Sequence[float], change_at_start: Sequence[float], groups: Sequence[str]) -> Interval:
    """Share of a change of preference odds that is left after forced tokens, with its 95 % interval over prompts.

    Σ [odds_π − odds_π₀ after k forced tokens] / Σ [the same after none], of the same pairs: 1 is all of it, 0 nothing, below 0 the
    opposite. NaN where the change without forced tokens is not told from 0.

    Args:
        change_after, change_at_start: change of log [P(chosen) / P(rejected)] of each pair, nats.
        groups: a name for each pair; pairs of one prompt share it.

    Raises:
        ValueError: lengths that differ, or no pair.

    >>> round(preference_left([1.0, 2.0, 1.5], [4.0, 5.0, 4.5], ["a", "b", "c"]).value, 6)
    0.333333
    """
    mean = ratio_of_sums(change_at_start, [1.0] * len(groups), groups)
    return ratio_of_sums(change_after, change_at_start, groups) if mean.low > 0 or mean.high < 0 else NO_INTERVAL


def ratio_by_token(
    over: Sequence[Float[Tensor, " _"]], under: Sequence[Float[Tensor, " _"]], groups: Sequence[str]
) -> list[AtToken]:
    """Σ over / Σ under at each token that responses of at least two prompts reach, with 95 % intervals over prompts.

    Raises:
        ValueError: lengths that differ.
    """
    if not len(over) == len(under) == len(groups) or any(len(a) != len(b) for a, b in zip(over, under, strict=True)):
        raise ValueError(f"expected as many names of prompts as responses, got {len(groups)} and {len(over)}")
    found = []
    for token in range(max(map(len, over), default=0)):
        rows = [row for row, of in enumerate(over) if len(of) > token]
        names = [groups[row] for row in rows]
        if len(set(names)) < 2:
            break
        tops, bottoms = ([float(of[row][token]) for row in rows] for of in (over, under))
        known = sum(bottoms) > _ROUNDING * len(rows)
        found.append(AtToken(token + 1, ratio_of_sums(tops, bottoms, names) if known else NO_INTERVAL, len(rows)))
    return found


def ratio_of_sums(
    over: Sequence[float], under: Sequence[float], groups: Sequence[str], *, scale: Scale = LINEAR
) -> Interval:
    """Σ over / Σ under with a 95 % jackknife interval over prompts; without ends for a single prompt.

    Raises:
        ValueError: lengths that differ, or none.

    >>> ratio_of_sums([1.0, 2.0], [2.0, 4.0], ["a", "a"])
    Interval(value=0.5, low=nan, high=nan)
    """
    if not len(over) == len(under) == len(groups):
        raise ValueError(f"expected columns of one length, got {len(over)}, {len(under)} and {len(groups)}")
    tops, bottoms = (torch.tensor(list(x), dtype=torch.float64) for x in (over, under))
    if len(set(groups)) == 1:
        return Interval(float(tops.sum() / bottoms.sum()), math.nan, math.nan)
    return jackknife_interval(lambda drawn: drawn @ tops / (drawn @ bottoms), groups, scale=scale)
