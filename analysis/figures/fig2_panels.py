"""Panels of the steering figure, and what they look up in ``sweep.csv``: curves over λ with random controls in grey, effects."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes

from analysis.behaviour.words import rules_fired
from analysis.controls.c15_random_vectors import COLLAPSED, CONTROLS_COLLAPSED, DEGENERATE, EQUAL_NORM, text_of
from analysis.open.observations import site_name
from analysis.report.site_axes import as_text
from analysis.report.style import COLOURS, mark_level
from analysis.steering.directions import RANDOM, V_BAR, V_STAR
from analysis.steering.sweep import CHOOSING, nearest_to_one
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM
from tiltmeter.stats.among_random import ABOVE, SAME, AmongRandom, among_random

_SITES_DRAWN = 3
LOWEST = -1.0
"""Recovery is drawn down to here: what leads further away is off the figure, not off the table."""
_SITE_LOOKS = (("policy_dark", "o"), ("policy", "s"), ("policy_light", "^"))
"""Colour and mark, so that sites can be told apart without colour."""
_ASIDE = 0.012
"""Share of the span of λ by which curves stand beside each other, so that none hides another's interval."""
_LEGEND_ABOVE = 2.4
"""Upper end of the axis of R, whose values end at 1: the legend stands between."""
_LINES = {V_STAR: "-", V_BAR: "--"}
GOALS = {"interpolation": "aligned model", "inversion": "base"}
_DOING = {"interpolation": "Adding", "inversion": "Subtracting"}
HOW = {"interpolation": "added", "inversion": "subtracted"}
_WORDS = {"interpolation": "added to the base", "inversion": "subtracted from the aligned model"}
_NAMES = {
    V_BAR: "v̄",
    "singular_raw": "u{} of the update",
    "singular_centred": "u{} of the update, centred",
    "pca_raw": "PC{} of the base, raw",
    "pca_centred": "PC{} of the base, centred",
    "difference_of_means": "chosen − rejected",
    "probe": "preference probe",
    "shuffled_layer": "v* of another layer",
}
_SHORT = {FINAL_PRE_NORM: "last layer", FINAL_POST_NORM: "logit bias"}
"""Sites in a legend or table; after the final norm, steering is nothing but a logit bias."""
_AT_RESPONSES = ("difference_of_means", "probe")
"""Kinds that are always read there, so that their names need not say it."""
_LONGEST = 26
"""Characters of a name."""


def draw_recovery(axes: Axes, table: pd.DataFrame, *, direction: str) -> str:
    """R over λ for every vector, with intervals and the span of the random controls."""
    _draw_lines(axes, table, direction, "recovery")
    low, _ = axes.get_ylim()
    axes.set_ylim(max(low, LOWEST), _LEGEND_ABOVE)
    axes.set_yticks([tick for tick in (-1.0, -0.5, 0.0, 0.5, 1.0) if tick >= max(low, LOWEST)])
    mark_level(axes, 1.0)
    axes.set_ylabel("recovery R")
    axes.legend(
        loc="upper center",
        frameon=False,
        fontsize=6,
        ncols=2,
        columnspacing=0.8,
        handlelength=1.4,
    )
    best, strength = best_site(table, direction), compared_at(table)
    found = beside_random(table, direction, best, "recovery", strength)
    doing, goal = f"{_DOING[direction]} v* at {site_name(best)}", f"the {GOALS[direction]} at λ = {strength:g}"
    if found.value < 0:
        return f"{doing} leads away from {goal}: R is {as_text(found.value, 'percent')}, {random_span(found)}"
    return f"{doing} recovers {as_text(found.value, 'percent')} of the way to {goal}; {random_span(found)}"


def draw_preference(axes: Axes, table: pd.DataFrame, *, direction: str) -> str:
    """Change of the preference margin over λ, pair by pair, and where the goal's lies."""
    _draw_lines(axes, table, direction, "preference_odds_change")
    best, strength = best_site(table, direction), compared_at(table)
    at_zero = {d: value_at(table, d, V_STAR, best, "preference_odds", 0.0) for d in GOALS}
    goal = at_zero["inversion" if direction == "interpolation" else "interpolation"]
    mark_level(axes, goal - at_zero[direction])
    axes.set_ylabel("change of the margin, nats")
    reached = value_at(table, direction, V_STAR, best, "preference_odds", strength)
    return (
        f"Preference margin: {as_text(at_zero[direction], '+.1f')} nats unsteered, {as_text(reached, '+.1f')} with v* at "
        f"{site_name(best)} {_WORDS[direction]} at λ = {strength:g}, {as_text(goal, '+.1f')} in the {GOALS[direction]}"
    )


def draw_degeneration(axes: Axes, table: pd.DataFrame) -> str:
    """Share of degenerate completions over λ, interpolation."""
    direction = "interpolation"
    _draw_lines(axes, table, direction, "degeneration", band=False)
    axes.set_ylim(-0.03, 1.03)
    sites = drawn_sites(table)
    usual = value_at(table, direction, V_STAR, sites[0], "degeneration", 0.0)
    mark_level(axes, usual + DEGENERATE)
    axes.set_ylabel("degenerate completions")
    ceilings = {site: ceiling(table, direction, V_STAR, site) for site in sites}
    found = {site: x for site, x in ceilings.items() if x is not None}
    more = (
        "10\u00a0% of the completions" if usual == 0 else f"10 points above the unsteered {as_text(usual, 'percent')}"
    )
    if not found:
        return f"Adding v* breaks no more than {more} up to λ = {table['lambda'].max():g}"
    first = min(found, key=found.__getitem__)
    fired = rules_fired(lambda name: value_at(table, direction, V_STAR, first, name, found[first]))
    return f"Adding v* breaks more than {more} from λ = {found[first]:g} on, at {site_name(first)} (by rule: {fired})"


def draw_effects(axes: Axes, effects: pd.DataFrame, *, direction: str, sites: Sequence[str], site: str) -> str:
    """What each vector recovers beyond random ones, site by site; hollow where the interval includes 0.

    Args:
        effects: :func:`analysis.controls.c15_random_vectors.steering_effects`.
        sites: drawn.
        site: that the message is about.
    """
    rows = effects[(effects["direction"] == direction) & (effects["metric"] == "recovery")]
    rows = rows[(rows["equal"] == EQUAL_NORM) & (rows["control"] == RANDOM)]
    shown = rows[rows["site"].isin(sites)]
    names = list(dict.fromkeys(shown["vector"]))
    ends = [0.0, *shown["ci_low"].dropna(), *shown["ci_high"].dropna()]
    axes.set_xlim(max(LOWEST, min(ends)) - 0.05, max(ends) + 0.05)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [vector_name(name) for name in names], fontsize=6)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x")
    axes.axvline(0, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for row in shown.itertuples():
        at = list(sites).index(row.site)
        y = names.index(row.vector) + 0.22 * (at - (len(sites) - 1) / 2)
        colour, mark = _SITE_LOOKS[at]
        _draw_effect(axes, row, y, COLOURS[colour], mark)
    axes.set_xlabel("R less that of random vectors")
    own = rows[(rows["vector"] == V_STAR) & (rows["site"] == site)].iloc[0]
    n_above = int((rows["verdict"] == ABOVE).sum())
    said = f"{n_above} of {len(rows)} vectors and sites recover more than random ones when {HOW[direction]}"
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


def ceiling(table: pd.DataFrame, direction: str, vector: str, site: str) -> float | None:
    """The smallest λ above 0 of the grid at which text has collapsed; None: there is none."""
    strengths = rows_of(table, direction, vector, site, "degeneration")["lambda"].tolist()
    collapsed = [x for x in strengths if x > 0 and text_of(table, direction, vector, site, x).has_collapsed]
    return min(collapsed, default=None)


def vector_name(name: str) -> str:
    """A vector on the page: what it is, and where its states were read when that is not the usual place.

    >>> vector_name("singular_raw_2"), vector_name("v*@response_mean"), vector_name("v*_of_sft_chosen")
    ('u2 of the update', 'v* at response mean', 'v* of sft_chosen')
    """
    plain, at, position = name.partition("@")
    kind, _, number = plain.rpartition("_")
    if ":" in name:
        text = name
    elif kind in _NAMES and number.isdecimal():
        text = _NAMES[kind].format(number)
    else:
        text = _NAMES.get(plain, plain.replace("_of_", " of "))
    if at and ":" not in name and plain not in _AT_RESPONSES:
        text += f" at {position.replace('_', ' ')}"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def short_site(site: str) -> str:
    """A site where there is little room.

    >>> short_site("layer_03"), short_site("final_post_norm")
    ('layer 3', 'logit bias')
    """
    return _SHORT.get(site, site_name(site))


def _draw_lines(axes: Axes, table: pd.DataFrame, direction: str, metric: str, *, band: bool = True) -> None:
    """Every vector of the sites drawn with its interval; behind them from least to largest random control."""
    sites = drawn_sites(table)
    if band and (bands := _random_bands(table, direction, metric, sites)):
        strengths, lows, highs = zip(*bands, strict=True)
        axes.fill_between(
            strengths, lows, highs, color=COLOURS["null"], alpha=0.45, linewidth=0, label="95\u00a0% of random"
        )
    named = table[table["vector"] != RANDOM]["lambda"]
    low, high = named.min(), named.max()
    curves = [
        (vector, site, look, rows)
        for site, look in zip(sites, _SITE_LOOKS, strict=False)
        for vector in _LINES
        if not (rows := rows_of(table, direction, vector, site, metric)).empty
    ]
    for i, (vector, site, (colour, shape), rows) in enumerate(curves):
        aside = (high - low) * _ASIDE * (i - (len(curves) - 1) / 2)
        axes.vlines(rows["lambda"] + aside, rows["ci_low"], rows["ci_high"], colors=COLOURS[colour], linewidth=0.6)
        axes.plot(
            rows["lambda"] + aside,
            rows["value"],
            _LINES[vector],
            linewidth=1.0,
            marker=shape,
            markersize=2.5,
            color=COLOURS[colour],
            label=f"{vector_name(vector)} {short_site(site)}",
        )
    room = (high - low) * _ASIDE * (len(curves) + 1) / 2
    axes.set_xlim(low - room, high + room)
    axes.set_xlabel("λ (1: the vector at its own length)")


def rows_of(table: pd.DataFrame, direction: str, vector: str, site: str | None, metric: str) -> pd.DataFrame:
    """Rows of a vector, in the order of λ."""
    found = table[(table["direction"] == direction) & (table["vector"] == vector) & (table["metric"] == metric)]
    return (found if site is None else found[found["site"] == site]).sort_values("lambda")


def value_at(table: pd.DataFrame, direction: str, vector: str, site: str, metric: str, strength: float) -> float:
    """One value of the table; NaN where it has none."""
    rows = rows_of(table, direction, vector, site, metric)
    rows = rows[rows["lambda"] == strength]
    return math.nan if rows.empty else float(rows["value"].iloc[0])


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
    """Where 95 % of further random vectors lie, in words."""
    low, high = (as_text(x, "percent") for x in (found.prediction.low, found.prediction.high))
    return f"95\u00a0% of random vectors there {low} to {high}"


def _random_bands(
    table: pd.DataFrame, direction: str, metric: str, sites: Sequence[str]
) -> list[tuple[float, float, float]]:
    """By λ the prediction interval of random vectors, from the lowest to the highest of the sites."""
    found = []
    for strength in sorted(rows_of(table, direction, RANDOM, None, metric)["lambda"].unique()):
        drawn = [torch.tensor([controls_at(table, direction, site, metric, strength)]).double() for site in sites]
        spans = [among_random(one[:, 0], one).prediction for one in drawn if one.numel()]
        if spans:
            found.append((strength, min(span.low for span in spans), max(span.high for span in spans)))
    return found


def compared_at(table: pd.DataFrame) -> float:
    """The λ that vectors are compared at."""
    return nearest_to_one(table[table["vector"] == V_STAR]["lambda"].unique().tolist())


def best_site(table: pd.DataFrame, direction: str) -> str:
    """The site where v* recovers most at λ = 1 of the pairs that it was estimated on, which no other number is of."""
    return _ranked(table, direction)[0]


def drawn_sites(table: pd.DataFrame) -> list[str]:
    """The best sites, in the order of the table."""
    best = set(_ranked(table, "interpolation")[:_SITES_DRAWN])
    return [site for site in dict.fromkeys(table["site"]) if site in best]


def _ranked(table: pd.DataFrame, direction: str) -> list[str]:
    rows = rows_of(table, direction, V_STAR, None, CHOOSING)
    ranked: list[str] = rows.sort_values("value", ascending=False, kind="stable")["site"].tolist()
    return ranked
