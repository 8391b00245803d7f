"""Log-odds of preference and of utility, on one scale and without a judge: teacher-forced log-probs alone.

Of a pair of answers that are opposite in polarity (chosen and rejected), L_p = −log P(positive) and L_n = −log P(negative):

    PrefOdds = log [P(positive) / P(negative)] = L_n − L_p
    UtilOdds = log [(P(positive) + P(negative)) / (1 − P(positive) − P(negative))]

(Xu et al., "Why Steering Works", arXiv 2602.02343). PrefOdds says which answer, UtilOdds how probable it is that the model gives
either of them: it falls when steering breaks the model. P is of a whole answer, so L is a sum over its tokens; with long
answers UtilOdds is nearly the log-prob of the likelier one.

At which steering strength does a model break? The decay of its log-odds over a sweep, fitted.

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
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import least_squares
from torch import Tensor

from tiltmeter.scoring.scorer import MAX_MISSING_SHARE, Figure, Scores, Side, grouped_mean_figure
from tiltmeter.stats.jackknife import NO_INTERVAL, jackknife_interval

SCORER = "teacher-forced log-probs"


def preference_odds(loss_positive: Float[Tensor, "*n"], loss_negative: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """L_n − L_p in nats, in float64: above 0 where the positive answer is the more probable one; NaN unless both L are finite.

    >>> preference_odds(torch.tensor([1.0]), torch.tensor([3.0])).tolist()
    [2.0]
    """
    difference = loss_negative.to(torch.float64) - loss_positive.to(torch.float64)
    return difference.masked_fill(~difference.isfinite(), torch.nan)


def utility_odds(loss_positive: Float[Tensor, "*n"], loss_negative: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log [(e^−L_p + e^−L_n) / (1 − e^−L_p − e^−L_n)] in nats, in float64.

    With s = log (e^−L_p + e^−L_n) it is s − log (1 − e^s), which neither under- nor overflows. NaN where it has no value: the two
    are certain together (s = 0), they are no probabilities of two different answers (s > 0), or one L isn't finite.

    >>> round(float(utility_odds(torch.tensor([1.0]), torch.tensor([3.0]))), 6)
    -0.33236
    """
    either = torch.logaddexp(-loss_positive.to(torch.float64), -loss_negative.to(torch.float64))
    known = loss_positive.isfinite() & loss_negative.isfinite() & (either < 0)
    safe = either.where(known, -1.0)
    return (safe - log1mexp(safe)).masked_fill(~known, torch.nan)


def log1mexp(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log(1 − e^x) for x < 0 without cancellation (Mächler 2012): log(−expm1 x) above −ln 2, log1p(−e^x) below.

    >>> [round(y, 6) for y in log1mexp(torch.tensor([-1e-12, -50.0], dtype=torch.float64)).tolist()]
    [-27.631021, -0.0]
    """
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def odds_scores(
    loss_positive: Sequence[float], loss_negative: Sequence[float], *, groups: Sequence[str], of: Side = "policy"
) -> Scores:
    """``preference_odds`` and ``utility_odds``: means over pairs in nats, with intervals over prompts.

    Args:
        loss_positive: −log π(chosen | x) of each pair, summed over its tokens, in nats; NaN: missing.
        loss_negative: of the rejected answers.
        groups: a name for each pair; pairs of one prompt share it.
        of: whose log-probs they are.

    Returns:
        Figures, and columns of the same names with a value a pair; what has no value is NaN and counted.

    Raises:
        ValueError: lengths that differ.
    """
    if len({len(loss_positive), len(loss_negative), len(groups)}) > 1:
        raise ValueError(
            f"odds_scores: expected columns of one length, got {len(loss_positive)}, {len(loss_negative)}, {len(groups)}"
        )
    losses = [torch.tensor(column, dtype=torch.float64) for column in (loss_positive, loss_negative)]
    columns = {"preference_odds": preference_odds(*losses).tolist(), "utility_odds": utility_odds(*losses).tolist()}
    figures = [grouped_mean_figure(name, of, column, groups, scorer=SCORER) for name, column in columns.items()]
    return Scores(figures, {f"{name}/{of}": column for name, column in columns.items()})


def perplexity_figure(
    log_probs: Sequence[float], n_tokens: Sequence[int], *, groups: Sequence[str], of: Side = "policy"
) -> Figure:
    """``perplexity`` of given texts: exp(−Σ log π / Σ tokens), so every token weighs the same; 1 … ∞.

    It depends on the tokenizer: compare models that share one. Teacher-forced on neutral or reference text it shows damage
    done by steering (control C18) before anything is generated.

    Args:
        log_probs: log π of each text, summed over its tokens, in nats; NaN: missing.
        n_tokens: tokens that the sums are over; texts without any count as missing.
        groups: a name for each text; those of one prompt share it.
        of: whose log-probs they are.

    Raises:
        ValueError: lengths that differ.

    >>> perplexity_figure([-2.0, -6.0], [1, 3], groups=["a", "b"]).value == math.exp(2)
    True
    """
    read = [
        (log_prob, n, group)
        for log_prob, n, group in zip(log_probs, n_tokens, groups, strict=True)
        if n > 0 and math.isfinite(log_prob)
    ]
    n_missing = len(log_probs) - len(read)
    if not read or n_missing > MAX_MISSING_SHARE * len(log_probs):
        return Figure("perplexity", of, *NO_INTERVAL, len(read), n_missing, SCORER)
    sums, counts = (torch.tensor([one[i] for one in read], dtype=torch.float64) for i in range(2))
    nats = jackknife_interval(lambda drawn: -(drawn @ sums) / (drawn @ counts), [group for _, _, group in read])
    value, low, high = torch.tensor(nats, dtype=torch.float64).exp().tolist()
    return Figure("perplexity", of, value, low, high, len(read), n_missing, SCORER)


Array = NDArray[np.float64]
Kind = Literal["preference", "utility"]

_STARTS_AT = (0.0, 0.25, 0.6)
"""m± that the search starts from, as shares of the farthest strength; the best of all is taken."""
_POWERS = (0.05, 10.0)


class Branch(NamedTuple):
    """Decay on one side of 0; NaN throughout where the sweep has no strengths."""

    m: float
    """Strength at which decay begins; ≤ 0 on the negative side."""
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
