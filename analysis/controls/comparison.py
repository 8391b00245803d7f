"""Comparison of an effect with the same figure under a control: both values, and an interval of their difference."""

from typing import NamedTuple

from tiltmeter.stats.among_random import UNKNOWN, AmongRandom
from tiltmeter.stats.jackknife import NO_INTERVAL, Interval


class Comparison(NamedTuple):
    """An effect beside the same figure under one control, in the figure's own unit."""

    effect: float
    null: float
    """Mean under the control."""
    interval: Interval
    """Effect less null, 95 %; NaN where they aren't compared."""
    verdict: str
    draws: AmongRandom
    """Place of the value among the control's draws, for tables and figures."""


def beside_draws(found: AmongRandom, *, screened: str | None = None) -> Comparison:
    """The comparison with a sample of the control.

    Args:
        screened: why the two aren't compared; None: they are, as far as there are enough draws.
    """
    verdict = screened or found.verdict
    interval = NO_INTERVAL if screened or verdict == UNKNOWN else found.difference
    return Comparison(found.value, found.random_mean, interval, verdict, found)
