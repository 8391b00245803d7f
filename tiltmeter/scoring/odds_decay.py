"""At which steering strength does a model break? The decay of its log-odds over a sweep, fitted.

Xu et al. (arXiv 2602.02343) explain the log-odds along a sweep of strengths m by a validity D that decays once steering
leaves what the model has learned, with one branch for either sign:

    D(m) = [1 + (m − m±)² / L±]^(−p±)
    PrefOdds(m) = (α m + β) D(m) + b,    UtilOdds(m) = β D(m) + b

Here the + branch holds above m₊ ≥ 0, the − branch below m₋ ≤ 0, and D = 1 between the two, so that D is continuous and its
largest value is 1; p is looked for from 0.05 to 10. L and p are hardly told apart by a sweep (a large L with a large p is a
Gaussian); where D falls to ½ is.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Array = NDArray[np.float64]
Kind = Literal["preference", "utility"]

_STARTS_AT = (0.0, 0.25, 0.6)
"""m± that the search starts from, as shares of the farthest strength; the best of all is taken."""
_POWERS = (0.05, 10.0)


class Branch(NamedTuple):
    """Decay on one side of 0; NaN throughout where the sweep has no strengths."""

    m: float
    """Where decay begins; ≤ 0 on the negative side."""
    length: float
    """L, in squared strengths."""
    power: float
    """p."""
    half: float
    """Strength at which D = ½: m± ± √(L (2^(1/p) − 1)); NaN where that lies outside the sweep."""


class DecayFit(NamedTuple):
    """Parameters by least squares; every number is NaN when there is no fit, and ``reason`` says why."""

    plus: Branch
    minus: Branch
    slope: float
    """α, nats a unit of strength; 0 for utility."""
    level: float
    """β, nats."""
    floor: float
    """b, nats: what is left when D = 0."""
    r_squared: float
    """1 − Σ residual² / Σ (y − ȳ)², of the points that were fitted."""
    n: int
    """Points that were fitted; those that are not finite are left out."""
    reason: str
    """Empty: converged."""


def fit_decay(strengths: Sequence[float], odds: Sequence[float], *, kind: Kind) -> DecayFit:
    """Fit one sweep's mean log-odds by least squares, α, β and b solved exactly inside the search for m, L and p.

    Args:
        strengths: m (λ) of each point, on one side of 0 or on both.
        odds: PrefOdds or UtilOdds at each, in nats; NaN: missing.
        kind: which of the two: utility has no slope α.

    Returns:
        The fit, or NaN and a reason: too few points for its parameters, a flat sweep, utility that grows instead,
        or a search that did not converge.

    Raises:
        ValueError: lengths that differ.

    >>> sweep = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    >>> found = fit_decay(sweep, [6 / (1 + max(0.0, m - 1) ** 2) - 4 for m in sweep], kind="utility")
    >>> round(found.level, 3), round(found.floor, 3), round(found.plus.half, 3)
    (6.0, -4.0, 2.0)
    """
    if len(strengths) != len(odds):
        raise ValueError(f"fit_decay: expected as many strengths as odds, got {len(strengths)} and {len(odds)}")
    m, y = np.asarray(strengths, dtype=np.float64), np.asarray(odds, dtype=np.float64)
    there = np.isfinite(y) & np.isfinite(m)
    m, y = m[there], y[there]
    signs = [sign for sign in (1.0, -1.0) if (sign * m > 0).any()]
    n_parameters = 3 * len(signs) + (3 if kind == "preference" else 2)
    fewest = min((len(np.unique(m[sign * m > 0])) for sign in signs), default=0)
    if len(np.unique(m)) <= n_parameters or fewest < 3:
        return _no_fit(
            len(m),
            f"expected more than {n_parameters} strengths, one a parameter, and 3 on each side that was swept, "
            f"got {len(np.unique(m))}",
        )
    if np.ptp(y) <= 1e-12 * np.abs(y).max():
        return _no_fit(len(m), "the log-odds do not change along the sweep")
    best, why = _search(m, y, signs, kind)
    if best is None:
        return _no_fit(len(m), why)
    found = _describe(m, y, signs, kind, best)
    if kind == "utility" and found.level <= 0:
        return _no_fit(len(m), "utility grows along the sweep: there is no decay")
    return found


def _search(m: Array, y: Array, signs: Sequence[float], kind: Kind) -> tuple[Array | None, str]:
    """The best of searches from several starts, or None and why."""
    farthest = np.repeat([np.abs(m[sign * m > 0]).max() for sign in signs], 3)
    scale = np.stack([farthest[::3], farthest[::3] ** 2], axis=1)
    low = np.concatenate([(0.0, math.log(1e-4 * square), math.log(_POWERS[0])) for _, square in scale])
    high = np.concatenate([(far, math.log(1e4 * square), math.log(_POWERS[1])) for far, square in scale])
    found = []
    for shares in product(_STARTS_AT, repeat=len(signs)):
        start = [
            x
            for share, (far, square) in zip(shares, scale, strict=True)
            for x in (share * far, math.log(square / 4), 0)
        ]
        found.append(least_squares(lambda theta: _solve(m, y, signs, kind, theta)[1], start, bounds=(low, high)))
    best = min(found, key=lambda result: result.cost)
    if not best.success or not np.isfinite(best.cost):
        return None, f"the search did not converge: {best.message}"
    return np.asarray(best.x), ""


def _validity(m: Array, signs: Sequence[float], theta: Array) -> Array:
    """D at every strength; theta holds |m±|, log L and log p of each side."""
    validity = np.ones_like(m)
    for sign, (begins, log_length, log_power) in zip(signs, np.reshape(theta, (-1, 3)), strict=True):
        beyond = np.maximum(sign * m - begins, 0.0)
        validity *= np.exp(-np.exp(log_power) * np.log1p(beyond**2 / np.exp(log_length)))
    return validity


def _solve(m: Array, y: Array, signs: Sequence[float], kind: Kind, theta: Array) -> tuple[Array, Array]:
    """α, β, b and the residuals of the best curve with these decays."""
    validity = _validity(m, signs, theta)
    columns = [m * validity, validity, np.ones_like(m)][0 if kind == "preference" else 1 :]
    design = np.stack(columns, axis=1)
    linear = np.linalg.lstsq(design, y, rcond=None)[0]
    return np.concatenate([np.zeros(3 - len(linear)), linear]), design @ linear - y


def _describe(m: Array, y: Array, signs: Sequence[float], kind: Kind, theta: Array) -> DecayFit:
    (slope, level, floor), residuals = _solve(m, y, signs, kind, theta)
    branches = {}
    for sign, (begins, log_length, log_power) in zip(signs, theta.reshape(-1, 3), strict=True):
        length, power = math.exp(log_length), math.exp(log_power)
        half = float(begins) + math.sqrt(length * (2 ** (1 / power) - 1))
        inside = half <= (sign * m).max()
        branches[sign] = Branch(sign * float(begins), length, power, sign * half if inside else math.nan)
    r_squared = 1 - np.square(residuals).sum() / np.square(y - y.mean()).sum()
    plus, minus = branches.get(1.0, _NO_BRANCH), branches.get(-1.0, _NO_BRANCH)
    return DecayFit(plus, minus, float(slope), float(level), float(floor), float(r_squared), len(m), "")


_NO_BRANCH = Branch(math.nan, math.nan, math.nan, math.nan)


def _no_fit(n: int, reason: str) -> DecayFit:
    return DecayFit(_NO_BRANCH, _NO_BRANCH, math.nan, math.nan, math.nan, math.nan, n, reason)
