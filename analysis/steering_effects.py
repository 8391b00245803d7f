"""Does a vector do more than random ones? Control C15: its effect less theirs, pair by pair, at equal norm and at equal KL.

    difference = effect of v − mean effect of the random vectors of one kind at the same site

with a 95 % interval over prompts, all vectors scored on the same ones. A claim about v fails where the interval includes 0.
The random vectors are taken as they were drawn; their least and largest effect stand beside their mean.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.steering_vectors import RANDOM_KINDS, random_kind
from analysis.sweep_table import Row
from tiltmeter.stats.bootstrap import Interval, cluster_intervals

DEGENERATE = 0.1
"""Degenerate completions beyond the unsteered model's share, above which a strength is past a vector's ceiling."""
EQUAL_NORM, EQUAL_KL = "norm", "kl"
ABOVE, BELOW, SAME, COLLAPSED, UNKNOWN = "above random", "below random", "not distinguishable", "collapsed", "no value"
COLUMNS = (
    *("direction", "vector", "site", "lambda", "metric", "equal", "control", "value", "control_mean", "control_low"),
    *("control_high", "n_controls", "difference", "ci_low", "ci_high", "n", "verdict"),
    *("kl_from_start", "degeneration", "degeneration_unsteered"),
)


class _Sums(NamedTuple):
    """What every pair adds, for one vector at one site."""

    kl: Float[Tensor, "strength pair"]
    kl_from_start: Float[Tensor, "strength pair"]
    preference_odds: Float[Tensor, "strength pair"]


class _Cell(NamedTuple):
    """All vectors of a direction and site, on the same pairs."""

    strengths: list[float]
    groups: list[str]
    n_tokens: float
    by_vector: dict[str, _Sums]


def steering_effects(pairs: pd.DataFrame, sweep: pd.DataFrame, *, strength: float) -> pd.DataFrame:
    """A row for each direction, site, vector, random kind and comparison: R and the margin at equal norm, the margin at equal KL.

    Args:
        pairs: :func:`analysis.sweep_table.read_pairs`.
        sweep: :func:`analysis.sweep_table.read_sweep`, for the share of degenerate completions: where it is more than 10
            points above that of λ = 0, nothing is compared.
        strength: λ that vectors are compared at.

    Returns:
        ``value`` is R, or the margin's change in nats, at λ. At equal KL all are taken where they have moved the model equally
        far, KL(unsteered ‖ steered): as far as v has at λ, or, where a random vector never goes so far, as that one does;
        between the λ of the grid by straight lines. ``kl_from_start`` is how far that is, nats a token.
    """
    rows: list[dict[str, Any]] = []
    for (direction, site), part in pairs.groupby(["direction", "site"], sort=False):
        cell = _cell_of(part)
        drawn = {kind: [name for name in cell.by_vector if random_kind(name) == kind] for kind in RANDOM_KINDS}
        for vector in [name for name in cell.by_vector if random_kind(name) is None]:
            broken, usual = (_degeneration(sweep, str(direction), vector, str(site), x) for x in (strength, 0.0))
            where = {"direction": direction, "vector": vector, "site": site, "lambda": strength}
            where |= {"degeneration": broken.value, "degeneration_unsteered": usual.value}
            for kind, controls in drawn.items():
                if controls:
                    has_collapsed = is_past_ceiling(broken, usual.value)
                    rows += [where | found for found in _compare(cell, vector, kind, controls, strength, has_collapsed)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def is_past_ceiling(share: Interval, unsteered: float) -> bool:
    """Whether text has collapsed: 10 points more of the completions are degenerate than without steering.

    Where the unsteered model's own text is that broken, chance alone moves its share about, so there the interval has to be
    above it. False where no text was scored.

    >>> [is_past_ceiling(Interval(0.4, low, 0.9), x) for low, x in ((0.1, 0.0), (0.1, 0.3), (0.1, 0.25), (0.3, 0.25))]
    [True, False, False, True]
    """
    is_broken_anyway = unsteered > DEGENERATE
    more = share.value - unsteered > DEGENERATE + 1e-9  # shares are sums that were rounded
    return more and (share.low > unsteered or not is_broken_anyway)


def _compare(
    cell: _Cell, vector: str, kind: str, controls: Sequence[str], strength: float, has_collapsed: bool
) -> list[dict[str, Any]]:
    """The three comparisons of a vector with the random ones of one kind."""
    at = cell.strengths.index(strength)
    compared = (("recovery", EQUAL_NORM), ("preference_odds", EQUAL_NORM), ("preference_odds", EQUAL_KL))
    names = [vector, *controls]

    def figures(drawn: Float[Tensor, "resample pair"]) -> Float[Tensor, "resample figure"]:
        """Of each comparison the vector's effect, each control's, their mean, and the difference."""
        columns = []
        for metric, equal in compared:
            effects, reached = _effects(cell, names, metric, equal, at, drawn)
            mean = effects[:, 1:].mean(1, keepdim=True)
            columns += [effects, mean, effects[:, :1] - mean, reached[:, None] / cell.n_tokens]
        return torch.cat(columns, dim=1)

    found = cluster_intervals(figures, cell.groups)
    step = len(found) // len(compared)
    rows = []
    for i, (metric, equal) in enumerate(compared):
        own, *random, mean, difference, far = found[i * step : (i + 1) * step]
        reached = [one.value for one in random if math.isfinite(one.value)]
        verdict = _verdict(difference, has_collapsed)
        if verdict in (COLLAPSED, UNKNOWN):
            difference = Interval(math.nan, math.nan, math.nan)
        numbers = (own.value, mean.value, min(reached, default=math.nan), max(reached, default=math.nan), len(reached))
        of_random = ("value", "control_mean", "control_low", "control_high", "n_controls")
        rows.append(
            {"metric": metric, "equal": equal, "control": kind, "n": len(cell.groups), "verdict": verdict}
            | {"kl_from_start": far.value}
            | dict(zip(of_random, numbers, strict=True))
            | dict(zip(("difference", "ci_low", "ci_high"), difference, strict=True))
        )
    return rows


def _effects(
    cell: _Cell, names: Sequence[str], metric: str, equal: str, at: int, drawn: Float[Tensor, "resample pair"]
) -> tuple[Float[Tensor, "resample vector"], Float[Tensor, " resample"]]:
    """Effects of vectors, and how far the first one has moved the model, summed over tokens."""
    zero = cell.strengths.index(0.0)
    sums = [cell.by_vector[name] for name in names]
    own_kl = drawn @ sums[0].kl_from_start[at]
    if metric == "recovery":
        kl = drawn @ torch.stack([one.kl[at] for one in sums], dim=1)
        return 1 - kl / (drawn @ sums[0].kl[zero])[:, None], own_kl
    n = drawn.sum(1, keepdim=True)
    if equal == EQUAL_NORM:
        return drawn @ torch.stack(
            [one.preference_odds[at] - one.preference_odds[zero] for one in sums], dim=1
        ) / n, own_kl
    forward = [i for i, x in enumerate(cell.strengths) if x >= 0]
    moved, gained = (
        torch.stack([drawn @ x[forward].T for x in part], dim=1)
        for part in ([s.kl_from_start for s in sums], [s.preference_odds - s.preference_odds[zero] for s in sums])
    )
    common = torch.minimum(own_kl, moved[:, 1:].amax(2).amin(1))
    return interpolate(moved, gained, common[:, None]) / n, common


def interpolate(
    x: Float[Tensor, "*curve point"], y: Float[Tensor, "*curve point"], at: Float[Tensor, "*#curve"]
) -> Float[Tensor, "*curve"]:
    """y where each curve first reaches x = ``at``, straight between its points; NaN where it never does.

    >>> x, y = torch.tensor([[0.0, 1.0, 4.0]]), torch.tensor([[0.0, 10.0, 16.0]])
    >>> interpolate(x, y, torch.tensor([2.0])).tolist(), interpolate(x, y, torch.tensor([5.0])).tolist()
    ([12.0], [nan])
    """
    at = at.expand(x.shape[:-1])[..., None]
    reaches = x >= at
    after = reaches.to(torch.int8).argmax(-1, keepdim=True)
    before = (after - 1).clamp(min=0)
    x0, x1, y0, y1 = x.gather(-1, before), x.gather(-1, after), y.gather(-1, before), y.gather(-1, after)
    share = torch.where(x1 > x0, (at - x0) / (x1 - x0), torch.zeros_like(x0))
    found = y0 + share * (y1 - y0)
    return found.where(reaches.any(-1, keepdim=True), torch.nan)[..., 0]


def _verdict(difference: Interval, has_collapsed: bool) -> str:
    if has_collapsed:
        return COLLAPSED
    if not math.isfinite(difference.value):
        return UNKNOWN
    return ABOVE if difference.low > 0 else BELOW if difference.high < 0 else SAME


def _degeneration(sweep: pd.DataFrame, direction: str, vector: str, site: str, strength: float) -> Interval:
    """Share of degenerate completions; NaN where no text was scored."""
    where = Row._fields[:3]
    rows = sweep[(sweep["metric"] == "degeneration") & (sweep["lambda"] == strength)]
    for column, value in zip(where, (direction, vector, site), strict=True):
        rows = rows[rows[column] == value]
    found = rows[["value", "ci_low", "ci_high"]].to_numpy(dtype=float)
    return Interval(*found[0].tolist()) if len(found) else Interval(math.nan, math.nan, math.nan)


def _cell_of(part: pd.DataFrame) -> _Cell:
    first = part[(part["vector"] == part["vector"].iloc[0]) & (part["lambda"] == 0)]
    order, strengths = first["pair_id"].tolist(), sorted(part["lambda"].unique().tolist())
    by_vector = {}
    for vector, rows in part.groupby("vector", sort=False):
        tables = [
            rows.pivot_table(index="lambda", columns="pair_id", values=name, dropna=False).loc[strengths, order]
            for name in _Sums._fields
        ]
        by_vector[str(vector)] = _Sums(*(torch.tensor(table.to_numpy(dtype=float)) for table in tables))
    return _Cell(strengths, first["prompt"].tolist(), float(first["n_tokens"].sum()), by_vector)
