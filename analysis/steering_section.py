"""The report's section on steering: Figures 2a and 2b of the paper from ``sweep.csv`` alone, random controls in grey."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from analysis.figures import COLOURS, house_style, mark_level, new_figure, set_titles
from analysis.observations import site_name
from analysis.report import Headline, Section
from analysis.site_axes import Panel, as_text
from analysis.steering_directions import POSITION, RANDOM, V_BAR, V_STAR
from analysis.sweep_table import SETTINGS, TABLE, read_settings, read_sweep

NAME = "steering_sweep"
DEGENERATE = 0.1
"""Share of degenerate completions above which a strength is past a vector's ceiling."""
_SITES_DRAWN = 3
_LOWEST = -1.0
"""Recovery is drawn down to here: what leads further away is off the figure, not off the table."""
_COLOURS = ("policy_dark", "policy", "dpo_swapped")
_VECTORS = {V_STAR: ("v*", "-"), V_BAR: ("v̄", "--")}
_GOALS = {"interpolation": "aligned model", "inversion": "base"}
_DOING = {"interpolation": "Adding", "inversion": "Subtracting"}
_WORDS = {"interpolation": "added to the base", "inversion": "subtracted from the aligned model"}


def steering_section_of(tables: Path) -> Section | None:
    """The section of a folder of tables; None where nothing was swept.

    Raises:
        UserError: a table is damaged; names the file.
    """
    if not (tables / TABLE).exists():
        return None
    return steering_section(read_sweep(tables / TABLE), read_settings(tables))


def steering_section(table: pd.DataFrame, settings: Mapping[str, Any]) -> Section | None:
    """The section ``steering_sweep``; None where no sweep has got as far as one vector in both directions.

    Args:
        table: :func:`analysis.sweep_table.read_sweep`.
        settings: that it was made with.
    """
    swept = [d for d in _GOALS if not _of(table, d, V_STAR, None, "recovery").empty]
    if len(swept) < len(_GOALS):
        return None
    panels: list[Panel] = []
    for direction in swept:
        panels += [partial(draw_recovery, direction=direction), partial(draw_preference, direction=direction)]
    if (table["metric"] == "degeneration").any():
        panels.append(draw_degeneration)
    with house_style():
        figure, axes = new_figure(len(panels), panel_height_cm=5.0)
        sentences = [draw(panel, table) for draw, panel in zip(panels, axes, strict=True)]
        axes[-1].set_xlabel("λ (1: the vector at the length of v*)")
        set_titles(figure, axes, sentences)
    return Section(
        name=NAME,
        question="Does moving hidden states along one vector turn the base into the aligned model, and back?",
        sentences=sentences,
        figure=figure,
        table=drawn_numbers(table),
        reading=_reading(table, settings),
        headlines=[_headline(table, direction) for direction in swept],
        shown=shown_table(table),
        caption="R and the preference margin at λ nearest to 1; random: the best control of the site",
    )


def draw_recovery(axes: Axes, table: pd.DataFrame, *, direction: str) -> str:
    """R over λ for every vector, with intervals and the span of the random controls."""
    _draw_lines(axes, table, direction, "recovery")
    low, _ = axes.get_ylim()
    axes.set_ylim(max(low, _LOWEST), 1.05)
    mark_level(axes, 1.0)
    axes.set_ylabel("recovery R")
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0.96),
        frameon=False,
        fontsize=6,
        ncols=2,
        columnspacing=1.0,
        handlelength=1.6,
    )
    best, strength = _best(table, direction), _nearest_to_one(table)
    reached = _value(table, direction, V_STAR, best, "recovery", strength)
    controls = _random(table, direction, best, "recovery", strength)
    best_control = as_text(max(controls, default=math.nan), "percent")
    doing, goal = f"{_DOING[direction]} v* at {site_name(best)}", f"the {_GOALS[direction]} at λ = {strength:g}"
    reached_text, others = (
        as_text(reached, "percent"),
        f"the best of {len(controls)} random vectors there {best_control}",
    )
    if reached < 0:
        return f"{doing} leads away from {goal}: R is {reached_text}, {others}"
    return f"{doing} recovers {reached_text} of the way to {goal}; {others}"


def draw_preference(axes: Axes, table: pd.DataFrame, *, direction: str) -> str:
    """Preference margin over λ, and where the goal's lies."""
    _draw_lines(axes, table, direction, "preference_odds")
    best, strength = _best(table, direction), _nearest_to_one(table)
    at_zero = {d: _value(table, d, V_STAR, best, "preference_odds", 0.0) for d in _GOALS}
    goal = at_zero["inversion" if direction == "interpolation" else "interpolation"]
    mark_level(axes, goal)
    axes.set_ylabel("preference margin, nats")
    reached = _value(table, direction, V_STAR, best, "preference_odds", strength)
    return (
        f"Preference margin: {as_text(at_zero[direction], '+.1f')} nats unsteered, {as_text(reached, '+.1f')} with v* at "
        f"{site_name(best)} {_WORDS[direction]} at λ = {strength:g}, {as_text(goal, '+.1f')} in the {_GOALS[direction]}"
    )


def draw_degeneration(axes: Axes, table: pd.DataFrame) -> str:
    """Share of degenerate completions over λ, interpolation."""
    direction = "interpolation"
    _draw_lines(axes, table, direction, "degeneration", band=False)
    axes.set_ylim(-0.03, 1.03)
    mark_level(axes, DEGENERATE)
    axes.set_ylabel("degenerate completions")
    ceilings = {site: ceiling(table, direction, V_STAR, site) for site in _sites(table)}
    found = {site: x for site, x in ceilings.items() if x is not None}
    if not found:
        return f"Adding v* breaks less than 10\u00a0% of the completions up to λ = {table['lambda'].max():g}"
    first = min(found, key=found.__getitem__)
    return (
        f"Adding v* breaks more than 10\u00a0% of the completions from λ = {found[first]:g} on, at {site_name(first)}"
    )


def ceiling(table: pd.DataFrame, direction: str, vector: str, site: str) -> float | None:
    """The smallest λ above 0 of the grid at which more than 10 % of completions are degenerate; None: there is none."""
    rows = _of(table, direction, vector, site, "degeneration")
    past = rows[(rows["lambda"] > 0) & (rows["value"] > DEGENERATE)]
    return None if past.empty else float(past["lambda"].min())


def drawn_numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that the figure is drawn from."""
    return table[table["metric"].isin(["recovery", "preference_odds", "degeneration"])].reset_index(drop=True)


def shown_table(table: pd.DataFrame) -> pd.DataFrame:
    """The table for the page, as text: a line for each direction, vector and site."""
    strength = _nearest_to_one(table)
    lines = []
    named = table[~table["vector"].str.startswith(RANDOM)]
    for direction, vector, site in named[["direction", "vector", "site"]].drop_duplicates().itertuples(index=False):
        recovery = _of(table, direction, vector, site, "recovery")
        if recovery.empty:
            continue
        at_one = recovery[recovery["lambda"] == strength].iloc[0]
        controls = _random(table, direction, site, "recovery", strength)
        top = recovery.loc[recovery["value"].idxmax()] if recovery["value"].notna().any() else recovery.iloc[0]
        past = ceiling(table, direction, vector, site)
        has_text = not _of(table, direction, vector, site, "degeneration").empty
        interval = f"{as_text(at_one['ci_low'], '.2f')} … {as_text(at_one['ci_high'], '.2f')}"
        lines.append(
            {
                "direction": direction,
                "vector": _VECTORS[vector][0],
                "site": site_name(site),
                "R": as_text(at_one["value"], ".2f"),
                "95 % interval": interval,
                "random": as_text(max(controls, default=math.nan), ".2f"),
                "largest R": f"{as_text(top['value'], '.2f')} at λ = {top['lambda']:g}",
                "margin": as_text(_value(table, direction, vector, site, "preference_odds", strength), "+.2f"),
                "degenerate from": "–" if not has_text else "none" if past is None else f"λ = {past:g}",
            }
        )
    return pd.DataFrame(lines)


def _draw_lines(axes: Axes, table: pd.DataFrame, direction: str, metric: str, *, band: bool = True) -> None:
    """Every vector of the sites drawn with its interval; behind them from least to largest random control."""
    sites = _sites(table)
    if band:
        controls = _random_rows(table, direction, metric)
        controls = controls[controls["site"].isin(sites)].groupby("lambda")["value"]
        axes.fill_between(
            controls.min().index,
            controls.min(),
            controls.max(),
            color=COLOURS["null"],
            alpha=0.45,
            linewidth=0,
            label="random",
        )
    for site, colour in zip(sites, _COLOURS, strict=False):
        for vector, (name, style) in _VECTORS.items():
            rows = _of(table, direction, vector, site, metric)
            if rows.empty:
                continue
            look: dict[str, Any] = {"color": COLOURS[colour]}
            axes.fill_between(rows["lambda"], rows["ci_low"], rows["ci_high"], alpha=0.2, linewidth=0, **look)
            axes.plot(
                rows["lambda"],
                rows["value"],
                style,
                marker="o",
                markersize=2,
                label=f"{name} {site_name(site)}",
                **look,
            )
    axes.set_xlim(table["lambda"].min(), table["lambda"].max())


def _reading(table: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    n = settings["n_test"]
    lines = [
        f"v* is the mean change of the hidden state at {POSITION} over {settings['n_estimation']} held-out pairs; every number is "
        f"of {n} other pairs, whose prompts it has not seen. Each vector at a site has the length of its v*.",
        "R = 1 − KL(goal ‖ steered) / KL(goal ‖ unsteered) over the tokens of the chosen responses, to each of which the vector is "
        "added: 0 is the model that steering starts from, 1 the one that it aims at, below 0 is further away. "
        f"Drawn down to {as_text(_LOWEST, '.0f')}; dashed: the goal.",
        "Preference margin: log π(chosen) − log π(rejected), summed over tokens; with chosen and rejected as the polarity pair "
        "it is PrefOdds (column metric: preference_odds).",
        f"Bands: 95 % intervals over prompts. Grey: from the least to the largest of {settings['n_random']} random vectors a site.",
        "At final_post_norm steering adds the same numbers to the logits whatever the context: a static logit bias.",
        "It does not show that v* is what DPO changed: a vector that raises the margin may do so while the model breaks, so look "
        "at R, perplexity and degeneration at the same λ; v* of SFT or of shuffled labels is not among the controls here.",
        f"All metrics are in {TABLE}, the settings in {SETTINGS}: run the command again and it goes on where it stopped.",
    ]
    if settings["n_generated"]:
        lines.insert(
            5,
            f"Degeneration: share of completions that are empty or repeat themselves, {settings['n_generated']} test prompts at "
            "most; only new tokens are steered, so the first one is the same at all λ.",
        )
    drawn, there = _sites(table), list(dict.fromkeys(table["site"]))
    if len(drawn) < len(there):
        lines.append(f"Drawn: the {len(drawn)} sites of {len(there)} where v* recovers most; the table has all.")
    return lines


def _headline(table: pd.DataFrame, direction: str) -> Headline:
    best, strength = _best(table, direction), _nearest_to_one(table)
    reached = _value(table, direction, V_STAR, best, "recovery", strength)
    controls = _random(table, direction, best, "recovery", strength)
    text = as_text(max(controls, default=math.nan), "percent")
    return Headline(
        as_text(reached, "percent"),
        f"of the way to the {_GOALS[direction]} by v* alone",
        f"{site_name(best)}, λ = {strength:g}, its best site; random: {text}. {TABLE}, metric recovery.",
    )


def _of(table: pd.DataFrame, direction: str, vector: str, site: str | None, metric: str) -> pd.DataFrame:
    found = table[(table["direction"] == direction) & (table["vector"] == vector) & (table["metric"] == metric)]
    return (found if site is None else found[found["site"] == site]).sort_values("lambda")


def _value(table: pd.DataFrame, direction: str, vector: str, site: str, metric: str, strength: float) -> float:
    rows = _of(table, direction, vector, site, metric)
    rows = rows[rows["lambda"] == strength]
    return math.nan if rows.empty else float(rows["value"].iloc[0])


def _random_rows(table: pd.DataFrame, direction: str, metric: str) -> pd.DataFrame:
    is_random = table["vector"].str.startswith(RANDOM)
    return table[(table["direction"] == direction) & is_random & (table["metric"] == metric)]


def _random(table: pd.DataFrame, direction: str, site: str, metric: str, strength: float) -> Sequence[float]:
    """The controls of a site at one λ."""
    rows = _random_rows(table, direction, metric)
    rows = rows[(rows["site"] == site) & (rows["lambda"] == strength)]
    found: list[float] = rows["value"].tolist()
    return found


def _nearest_to_one(table: pd.DataFrame) -> float:
    return float(min(table["lambda"].unique(), key=lambda x: abs(x - 1)))


def _best(table: pd.DataFrame, direction: str) -> str:
    """The site where v* recovers most at λ = 1."""
    rows = _of(table, direction, V_STAR, None, "recovery")
    rows = rows[rows["lambda"] == _nearest_to_one(table)]
    return str(rows.sort_values("value", ascending=False, kind="stable")["site"].iloc[0])


def _sites(table: pd.DataFrame) -> list[str]:
    """The sites drawn, in the order of the table."""
    rows = _of(table, "interpolation", V_STAR, None, "recovery")
    rows = rows[rows["lambda"] == _nearest_to_one(table)].sort_values("value", ascending=False, kind="stable")
    best = set(rows["site"].head(_SITES_DRAWN))
    return [site for site in dict.fromkeys(table["site"]) if site in best]
