"""Does a vector do more than random ones? Control C15, by :mod:`tiltmeter.stats.among_random`, at equal norm and at equal KL.

    difference = effect of v − mean effect of the random vectors of one kind at the same site, as long as v

with an interval for how far one more random vector may lie from v, all scored on the same prompts. Text is screened first, of v
and of its controls: whatever broke the model isn't compared.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from analysis.controls.comparison import Comparison, beside_draws
from analysis.open.observations import site_name
from analysis.report.site_axes import as_text
from analysis.report.style import COLOURS
from analysis.steering.table import DEGENERATION_P, rows_of, value_at
from tiltmeter.stats.among_random import ABOVE, BELOW, SAME, UNKNOWN, AmongRandom, among_random
from tiltmeter.stats.jackknife import without_each
from tiltmeter.steering.vector import RANDOM, RANDOM_KINDS, V_STAR

DEGENERATE = 0.1
"""Degenerate completions beyond the unsteered model's share, above which a strength is past a vector's ceiling."""
COLLAPSE_LEVEL = 0.05
"""Level of the exact test that there are more of them than without steering."""
EQUAL_NORM, EQUAL_KL = "norm", "kl"
COLLAPSED, CONTROLS_COLLAPSED = "collapsed", "controls collapsed"
VERDICTS = (ABOVE, SAME, BELOW, COLLAPSED, CONTROLS_COLLAPSED, UNKNOWN)
EFFECTS = "steering_effects"
LOWEST = -1.0
"""Recovery is drawn down to here: what leads further away is off the figure, not off the table."""
SITE_LOOKS = (("policy_dark", "o"), ("policy", "s"), ("policy_light", "^"))
"""Colour and mark, so that sites can be told apart without colour."""
COLUMNS = (
    *("direction", "vector", "site", "lambda", "metric", "equal", "control", "value", "control_mean", "control_low"),
    *("control_high", "n_controls", "prediction_low", "prediction_high", "difference", "ci_low", "ci_high", "p_above"),
    *("p_below", "n", "verdict", "kl_from_start", "degeneration", "degeneration_unsteered", "degeneration_p"),
    *("control_degeneration", "control_degeneration_p"),
)
COMPARED = (("recovery", EQUAL_NORM), ("preference_odds", EQUAL_NORM), ("preference_odds", EQUAL_KL))
UTILITY = "cross_entropy"
"""Metric: change of −log π of the chosen responses from the unsteered model, nats a token."""
BEYOND = 2.0
"""λ from which on it is compared, too, at equal KL: does a vector do more harm there than random ones that move a model as far?"""


class Text(NamedTuple):
    """Collapse of text at one strength; NaN where none was scored."""

    degenerate: float
    """Share of completions."""
    unsteered: float
    """Share of degenerate completions at λ = 0."""
    p_value: float
    """p-value of the exact test that steering made it more."""

    @property
    def has_collapsed(self) -> bool:
        """Whether 10 points more of the completions are degenerate than without steering, and chance rarely makes as many.

        >>> [Text(share, 0.05, p).has_collapsed for share, p in ((0.5, 0.001), (0.5, 0.2), (0.12, 0.001))]
        [True, False, False]
        """
        more = self.degenerate - self.unsteered > DEGENERATE + 1e-9  # shares are sums that were rounded
        return more and self.p_value <= COLLAPSE_LEVEL


class Sums(NamedTuple):
    """Sums of every pair, for one vector, or each draw of a random kind, at one site; strengths in ascending order."""

    strengths: list[float]
    norms: list[float]
    kl: Float[Tensor, "strength draw pair"]
    kl_from_start: Float[Tensor, "strength draw pair"]
    preference_odds: Float[Tensor, "strength draw pair"]
    chosen_log_prob: Float[Tensor, "strength draw pair"]

    @property
    def zero(self) -> int:
        """Place of λ = 0."""
        return self.strengths.index(0.0)

    def at_norm(self, norm: float) -> int | None:
        """The strength that adds something as long; None: none does."""
        return next((i for i, x in enumerate(self.norms) if math.isclose(x, norm, rel_tol=1e-4, abs_tol=1e-12)), None)


class Cell(NamedTuple):
    """All vectors of a direction and site, on the same pairs."""

    n_tokens: Float[Tensor, " pair"]
    """Tokens of the chosen responses."""
    weights: Float[Tensor, "kept pair"]
    """Weight of each pair: first all alike, then without each prompt in turn."""
    n_pairs: int
    by_vector: dict[str, Sums]


def steering_effects(pairs: pd.DataFrame, sweep: pd.DataFrame, *, strength: float) -> pd.DataFrame:
    """A row for each direction, site, vector, random kind and comparison: R and the margin at equal norm, the margin at equal KL.

    Beyond λ = 2 also the cross-entropy of chosen responses at equal KL, whatever became of text: that is what is asked.

    Args:
        pairs: :func:`analysis.steering.table.read_pairs`.
        sweep: :func:`analysis.steering.table.read_sweep`, for what became of text (:class:`Text`).
        strength: λ that vectors are compared at.

    Returns:
        ``value`` is R, or the margin's change in nats, at λ. At equal KL all are taken where they have moved the model equally
        far, KL(unsteered ‖ steered): as far as v has at λ, or, where a random vector never goes so far, as that one does;
        between the λ of the grid by straight lines over √KL, which grows as λ does. ``kl_from_start`` is how far that is, nats a
        token.
    """
    rows: list[dict[str, Any]] = []
    for (direction, site), part in pairs.groupby(["direction", "site"], sort=False):
        cell = cell_of(part)
        for vector in [name for name in cell.by_vector if name not in RANDOM_KINDS]:
            own = text_of(sweep, str(direction), vector, str(site), strength)
            for kind in [name for name in RANDOM_KINDS if name in cell.by_vector]:
                drawn = text_of(sweep, str(direction), kind, str(site), strength)
                known = {"direction": direction, "vector": vector, "site": site, "lambda": strength, "control": kind}
                known |= {"degeneration": own.degenerate, "degeneration_unsteered": own.unsteered}
                known |= {"degeneration_p": own.p_value, "control_degeneration": drawn.degenerate}
                known |= {"control_degeneration_p": drawn.p_value}
                for metric, equal in COMPARED:
                    screened = _screened(own, drawn, equal)
                    found, reached = compare(cell, vector, kind, metric, equal, strength, screened)
                    taken = {"metric": metric, "equal": equal, "n": cell.n_pairs, "kl_from_start": reached}
                    rows.append(known | _as_row(found) | taken)
                for beyond in (x for x in cell.by_vector[vector].strengths if x >= BEYOND):
                    found, reached = compare(cell, vector, kind, UTILITY, EQUAL_KL, beyond)
                    taken = {"metric": UTILITY, "equal": EQUAL_KL, "n": cell.n_pairs, "kl_from_start": reached}
                    rows.append(known | {"lambda": beyond} | _as_row(found) | taken)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _screened(own: Text, drawn: Text, equal: str) -> str | None:
    """Verdict that text has given already; None: the numbers decide."""
    if own.has_collapsed:
        return COLLAPSED
    return CONTROLS_COLLAPSED if drawn.has_collapsed and equal == EQUAL_NORM else None


def text_of(sweep: pd.DataFrame, direction: str, vector: str, site: str, strength: float) -> Text:
    """Collapse of text with a vector, or with the draws of a random kind, at one λ."""
    rows = sweep[(sweep["direction"] == direction) & (sweep["vector"] == vector) & (sweep["site"] == site)]

    def at(metric: str, strength: float) -> float:
        found = rows[(rows["metric"] == metric) & (rows["lambda"] == strength)]["value"]
        return float(found.iloc[0]) if len(found) else math.nan

    return Text(at("degeneration", strength), at("degeneration", 0.0), at(DEGENERATION_P, strength))


def ceiling(table: pd.DataFrame, direction: str, vector: str, site: str) -> float | None:
    """The smallest λ above 0 of the grid at which text has collapsed; None: there is none."""
    strengths = rows_of(table, direction, vector, site, "degeneration")["lambda"].tolist()
    collapsed = [x for x in strengths if x > 0 and text_of(table, direction, vector, site, x).has_collapsed]
    return min(collapsed, default=None)


def controls_at(table: pd.DataFrame, direction: str, site: str, metric: str, strength: float) -> list[float]:
    """The random vectors of a site, as long as λ times its v*."""
    rows = rows_of(table, direction, RANDOM, site, metric)
    found: list[float] = rows[rows["lambda"] == strength]["value"].tolist()
    return found


def beside_random(table: pd.DataFrame, direction: str, site: str, metric: str, strength: float) -> AmongRandom:
    """v* at a site beside random vectors as long, on the test pairs as they are."""
    value = value_at(table, direction, V_STAR, site, metric, strength)
    drawn = controls_at(table, direction, site, metric, strength)
    return among_random(torch.tensor([value]).double(), torch.tensor([drawn]).double())


def random_span(found: AmongRandom) -> str:
    """Interval that 95 % of further random vectors lie in, in words."""
    low, high = (as_text(x, "percent") for x in (found.prediction.low, found.prediction.high))
    return f"95\u00a0% of random vectors there {low} to {high}"


def counted_verdicts(effects: pd.DataFrame) -> str:
    """Number of comparisons of R at equal norm with each verdict, for each random kind."""
    rows = effects[(effects["metric"] == "recovery") & (effects["equal"] == EQUAL_NORM)]
    parts = []
    for kind, of_kind in rows.groupby("control", sort=False):
        counts = of_kind["verdict"].value_counts()
        said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in counts)
        parts.append(f"{kind} ({said})")
    return (
        "A vector that is not distinguishable from random ones of its length has no claim of its own. It is called above them "
        "where at most one in forty of them does as much, by rank and by where one more would lie, and where that holds for "
        f"other prompts. R, in {EFFECTS}.csv: {'; '.join(parts)}. There too: the margin at equal norm, and where all have moved "
        "the model equally far, KL(unsteered ‖ steered); subtracting is meant to lower it, so there below random is the aim."
    )


def draw_effects(
    axes: Axes,
    effects: pd.DataFrame,
    *,
    direction: str,
    sites: Sequence[str],
    site: str,
    labels: Mapping[str, str],
    how: str,
) -> str:
    """Draw R of each vector beyond random ones, site by site; hollow where the interval includes 0.

    Args:
        effects: :func:`steering_effects`.
        sites: drawn.
        site: that the message is about.
        labels: vectors on the page, by name.
        how: what was done, such as ``added``.
    """
    rows = effects[(effects["direction"] == direction) & (effects["metric"] == "recovery")]
    rows = rows[(rows["equal"] == EQUAL_NORM) & (rows["control"] == RANDOM)]
    shown = rows[rows["site"].isin(sites)]
    names = list(dict.fromkeys(shown["vector"]))
    ends = [0.0, *shown["ci_low"].dropna(), *shown["ci_high"].dropna()]
    axes.set_xlim(max(LOWEST, min(ends)) - 0.05, max(ends) + 0.05)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [labels.get(name, name) for name in names], fontsize=6)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x")
    axes.axvline(0, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for row in shown.itertuples():
        at = list(sites).index(row.site)
        y = names.index(row.vector) + 0.22 * (at - (len(sites) - 1) / 2)
        colour, mark = SITE_LOOKS[at]
        _draw_effect(axes, row, y, COLOURS[colour], mark)
    axes.set_xlabel("R less that of random vectors")
    own = rows[(rows["vector"] == V_STAR) & (rows["site"] == site)].iloc[0]
    n_above = int((rows["verdict"] == ABOVE).sum())
    said = f"{n_above} of {len(rows)} vectors and sites recover more than random ones when {how}"
    if not math.isfinite(own["difference"]):
        return f"{said}; v* at {site_name(site)}: {own['verdict']}"
    interval = f"{as_text(own['ci_low'], '+.2f')} to {as_text(own['ci_high'], '+.2f')}"
    return f"{said}; v* at {site_name(site)}: {as_text(own['difference'], '+.2f')} ({interval}), {own['verdict']}"


def _draw_effect(axes: Axes, row: Any, y: float, colour: str, shape: str) -> None:
    """A mark with its interval; a cross on the line where text collapsed, an arrow where it is off the figure."""
    low, _ = axes.get_xlim()
    mark: dict[str, Any] = {"marker": shape, "markersize": 3, "color": colour, "linestyle": ""}
    if row.verdict in (COLLAPSED, CONTROLS_COLLAPSED):
        axes.plot([0], [y], **(mark | {"marker": "x"}))
    elif row.difference < low:
        axes.plot([low], [y], **(mark | {"marker": "<", "clip_on": False}))
    else:
        axes.plot([row.ci_low, row.ci_high], [y, y], linewidth=1.0, color=colour)
        axes.plot([row.difference], [y], markerfacecolor="white" if row.verdict == SAME else colour, **mark)


def compare(
    cell: Cell, vector: str, kind: str, metric: str, equal: str, strength: float, screened: str | None = None
) -> tuple[Comparison, float]:
    """A vector beside the random ones of one kind, and how far it has moved the model, nats a token.

    Args:
        kind, metric, equal, strength: see :func:`steering_effects`.
        screened: why the two aren't compared.
    """
    own, drawn = cell.by_vector[vector], cell.by_vector[kind]
    at = own.strengths.index(strength)
    if equal == EQUAL_NORM:
        same = drawn.at_norm(own.norms[at])
        reached = cell.weights @ own.kl_from_start[at, 0]
        effects = [_at_norm(cell, x, metric, i) for x, i in ((own, at), (drawn, same))]
    else:
        effects, reached = _at_kl(cell, own, drawn, metric, at)
    found = beside_draws(among_random(effects[0][:, 0], effects[1]), screened=screened)
    return found, float(reached[0] / cell.n_tokens.sum())


def _as_row(found: Comparison) -> dict[str, Any]:
    draws, is_judged = found.draws, math.isfinite(found.interval.value)
    return {
        "value": found.effect,
        "control_mean": found.null,
        "control_low": draws.random_low,
        "control_high": draws.random_high,
        "n_controls": draws.n_random,
        "prediction_low": draws.prediction.low,
        "prediction_high": draws.prediction.high,
        **dict(zip(("difference", "ci_low", "ci_high"), found.interval, strict=True)),
        "p_above": draws.p_above if is_judged else math.nan,
        "p_below": draws.p_below if is_judged else math.nan,
        "verdict": found.verdict,
    }


def _at_norm(cell: Cell, sums: Sums, metric: str, at: int | None) -> Float[Tensor, "kept draw"]:
    """Effects at one strength; NaN where the sweep has none as long."""
    if at is None:
        return torch.full((len(cell.weights), sums.kl.shape[1]), math.nan, dtype=torch.float64)
    if metric == "recovery":
        return 1 - (cell.weights @ sums.kl[at].T) / (cell.weights @ sums.kl[sums.zero].T)
    change = sums.preference_odds[at] - sums.preference_odds[sums.zero]
    return cell.weights @ change.T / cell.weights.sum(1, keepdim=True)


def _at_kl(
    cell: Cell, own: Sums, drawn: Sums, metric: str, at: int
) -> tuple[list[Float[Tensor, "kept draw"]], Float[Tensor, " kept"]]:
    """Changes of a metric where all have moved the model equally far, and how far that is, summed over tokens."""
    curves = [_curve(cell, sums, metric) for sums in (own, drawn)]
    own_kl = cell.weights @ own.kl_from_start[at, 0]
    common = torch.minimum(own_kl, curves[1][0].square().amax(2).amin(1))
    n = cell.weights @ cell.n_tokens if metric == UTILITY else cell.weights.sum(1)
    return [interpolate(moved, gained, common.sqrt()[:, None]) / n[:, None] for moved, gained in curves], common


def _curve(cell: Cell, sums: Sums, metric: str) -> tuple[Float[Tensor, "kept draw strength"], ...]:
    """√KL from the start and the metric's change over λ ≥ 0, both summed over pairs."""
    forward = [i for i, x in enumerate(sums.strengths) if x >= 0]
    values = -sums.chosen_log_prob if metric == UTILITY else sums.preference_odds
    change = values[forward] - values[sums.zero]
    kl, gained = (torch.einsum("rp,sdp->rds", cell.weights, x) for x in (sums.kl_from_start[forward], change))
    return kl.clamp(min=0).sqrt(), gained


def interpolate(
    x: Float[Tensor, "*curve point"], y: Float[Tensor, "*curve point"], at: Float[Tensor, "*#curve"]
) -> Float[Tensor, "*curve"]:
    """y where each curve first reaches x = ``at``, straight between its points; NaN where it never does.

    >>> x, y = torch.tensor([[0.0, 1.0, 4.0]]), torch.tensor([[0.0, 10.0, 16.0]])
    >>> interpolate(x, y, torch.tensor([2.0])).tolist(), interpolate(x, y, torch.tensor([5.0])).tolist()
    ([12.0], [nan])
    """
    at = at.expand(x.shape[:-1])[..., None]
    reaches = x >= at * (1 - 1e-12)
    after = reaches.to(torch.int8).argmax(-1, keepdim=True)
    before = (after - 1).clamp(min=0)
    x0, x1, y0, y1 = x.gather(-1, before), x.gather(-1, after), y.gather(-1, before), y.gather(-1, after)
    share = torch.where(x1 > x0, (at - x0) / (x1 - x0), torch.zeros_like(x0))
    found = y0 + share * (y1 - y0)
    return found.where(reaches.any(-1, keepdim=True), torch.nan)[..., 0]


def cell_of(part: pd.DataFrame) -> Cell:
    """The rows of one direction and site (:func:`analysis.steering.table.read_pairs`)."""
    first = part[(part["vector"] == part["vector"].iloc[0]) & (part["draw"] == part["draw"].iloc[0])]
    first = first[first["lambda"] == 0]
    order, groups = first["pair_id"].tolist(), first["prompt"].tolist()
    by_vector = {str(name): _sums_of(rows, order) for name, rows in part.groupby("vector", sort=False)}
    return Cell(torch.tensor(first["n_tokens"].to_numpy(dtype=float)), without_each(groups), len(order), by_vector)


def _sums_of(rows: pd.DataFrame, order: list[str]) -> Sums:
    index = ["lambda", "draw"]
    strengths, draws = (sorted(rows[name].unique().tolist()) for name in index)
    wanted = pd.MultiIndex.from_product([strengths, draws])
    tables = [
        rows.pivot_table(index=index, columns="pair_id", values=name, dropna=False).loc[wanted, order]
        for name in Sums._fields[2:]
    ]
    norms = rows.groupby("lambda")["norm"].mean().loc[strengths].tolist()
    shape = (len(strengths), len(draws), len(order))
    return Sums(strengths, norms, *(torch.tensor(table.to_numpy(dtype=float)).reshape(shape) for table in tables))
