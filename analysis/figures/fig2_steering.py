"""Figures 2a and 2b of the paper from the sweep's tables alone: curves over λ with random vectors in grey, effects, verdicts."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes

from analysis.behaviour.words import judge_of_sweep, rules_fired
from analysis.controls.c15_random_vectors import (
    COLLAPSE_LEVEL,
    COLLAPSED,
    DEGENERATE,
    EFFECTS,
    EQUAL_KL,
    EQUAL_NORM,
    LOWEST,
    SITE_LOOKS,
    beside_random,
    ceiling,
    controls_at,
    counted_verdicts,
    draw_effects,
    random_span,
    steering_effects,
)
from analysis.figures.vector_labels import LAMBDA, NAMES, doing, how, how_many, short_site, vector_labels, words
from analysis.open.observations import site_name
from analysis.report.page import Headline, Section
from analysis.report.site_axes import Panel, as_text, draw_panels
from analysis.report.style import COLOURS, mark_level
from analysis.steering.table import (
    CHOOSING,
    PAIRS,
    SETTINGS,
    TABLE,
    VECTORS,
    best_site,
    compared_at,
    read_pairs,
    read_settings,
    read_sweep,
    read_vectors,
    rows_of,
    sites_by_recovery,
    value_at,
)
from tiltmeter.scoring.odds import Kind, fit_decay
from tiltmeter.stats.among_random import among_random
from tiltmeter.steering.vector import RANDOM, RANDOM_KINDS, V_BAR, V_STAR

NAME = "steering_sweep"
DECAY = "steering_decay"
VECTORS_FILE = f"{NAME}.safetensors"
"""The vectors that were swept, in ``vectors/`` beside the tables."""
_ENOUGH_TEXTS = 64
_LENGTHS = {
    "own": "At λ = 1 a vector has the length that it was estimated with; those without one (singular vectors, principal "
    "components, probes) that of the site’s v*.",
    "matched": "At λ = 1 vectors of a site have the length of its v*.",
    "relative": "At λ = 1 vectors have the mean length of the base’s hidden states at their site.",
}
_TOKENS = {
    "predicting": "to every token that one of the response is predicted from, the prompt’s last and those after it",
    "all": "to every token, the prompt’s included",
    "new": "to every token after the prompt; the first new one, predicted from the prompt’s last, is never changed",
    "prompt": "to the prompt’s tokens alone",
}
_SITES_DRAWN = 3
_ASIDE = 0.012
"""Share of the span of λ by which curves stand beside each other, so that none hides another's interval."""
_LEGEND_ABOVE = 2.4
"""Upper end of the axis of R, whose values end at 1: the legend stands between."""
_LINES = {V_STAR: "-", V_BAR: "--"}
GOALS = {"interpolation": "aligned model", "inversion": "base"}


def steering_section_of(tables: Path) -> Section | None:
    """The section of a folder of tables; None where nothing was swept.

    Raises:
        UserError: a table is damaged; names the file.
    """
    if not (tables / TABLE).exists():
        return None
    settings = read_settings(tables)
    return steering_section(read_sweep(tables / TABLE), read_pairs(tables / PAIRS), settings, read_vectors(tables))


def steering_section(
    table: pd.DataFrame, pairs: pd.DataFrame, settings: Mapping[str, Any], vectors: pd.DataFrame
) -> Section | None:
    """The section ``steering_sweep``; None where no sweep has got as far as one vector and its controls in both directions.

    Args:
        table: :func:`analysis.steering.table.read_sweep`.
        pairs: :func:`analysis.steering.table.read_pairs`.
        settings: that they were made with.
        vectors: :func:`analysis.steering.table.read_vectors`.
    """
    if any(rows_of(table, direction, V_STAR, None, CHOOSING).empty for direction in GOALS):
        return None
    effects, labels = steering_effects(pairs, table, strength=compared_at(table)), vector_labels(vectors, settings)
    if any(_of_v_star(effects, direction, best_site(table, direction)).empty for direction in GOALS):
        return None
    decay = decay_of_v_star(table)
    panels: list[Panel] = []
    for direction in GOALS:
        about = {
            "direction": direction,
            "sites": drawn_sites(table),
            "site": best_site(table, direction),
            "labels": labels,
            "how": how(table, direction),
        }
        panels += [
            partial(draw_recovery, direction=direction),
            lambda axes, _, about=about: draw_effects(axes, effects, **about),  # type: ignore[misc]
            partial(draw_preference, direction=direction),
        ]
    if (table["metric"] == "degeneration").any():
        panels.append(draw_degeneration)
    figure, sentences = draw_panels(panels, table, panel_height_cm=5.6)
    return Section(
        name=NAME,
        question="Does moving hidden states along one vector turn the base into the aligned model, and back?",
        claim="D-STEER, Fig. 2: moving the base’s hidden states along one vector makes its answers the aligned model’s, up to a "
        "strength from which text falls apart; subtracting v* from the aligned model gives back the base.",
        sentences=sentences,
        interval=_interval(table, effects, settings),
        limits=_limits(vectors, labels),
        figure=figure,
        table=drawn_numbers(table),
        reading=[*_reading(table, effects, settings, labels), _where_it_decays(table, decay)],
        headlines=[_headline(table, effects, direction) for direction in GOALS],
        shown=shown_table(table, effects, labels),
        caption=f"At λ = {compared_at(table):g}, where v* is best on other pairs, or at the vector’s one site; all sites and "
        f"comparisons are in {EFFECTS}.csv",
        more_tables={EFFECTS: effects, DECAY: decay},
    )


def decay_of_v_star(table: pd.DataFrame) -> pd.DataFrame:
    """Decay of v*'s log-odds over λ (:func:`tiltmeter.scoring.odds.fit_decay`), by direction, site and metric.

    Returns:
        ``half_plus`` and ``half_minus``: λ at which validity has fallen to ½ on either side; NaN without a fit, and ``reason`` says
        why: a fit takes more λ than it has parameters.
    """
    rows = []
    kinds: dict[str, Kind] = {"preference_odds": "preference", "utility_odds": "utility"}
    for direction in GOALS:
        for site in dict.fromkeys(rows_of(table, direction, V_STAR, None, CHOOSING)["site"]):
            for metric, kind in kinds.items():
                curve = rows_of(table, direction, V_STAR, site, metric)
                fit = fit_decay(curve["lambda"].tolist(), curve["value"].tolist(), kind=kind)
                found = {"half_plus": fit.plus.half, "half_minus": fit.minus.half, "r_squared": fit.r_squared}
                rows.append(
                    {"direction": direction, "site": site, "metric": metric, **found, "n": fit.n, "reason": fit.reason}
                )
    return pd.DataFrame(rows)


def _where_it_decays(table: pd.DataFrame, decay: pd.DataFrame) -> str:
    """λ at which the log-odds of v* have lost half of their validity, at its best site."""
    own = decay[(decay["direction"] == "interpolation") & (decay["site"] == best_site(table, "interpolation"))]
    fits = own.set_index("metric")
    said = [
        f"{metric} at λ = {as_text(row['half_plus'], '.2f')}"
        if math.isfinite(row["half_plus"])
        else f"{metric}: {row['reason'] or 'not within the λ that were swept'}"
        for metric, row in fits.iterrows()
    ]
    return f"Where the log-odds with v* added have lost half of their validity, at its best site: {'; '.join(said)}. {DECAY}.csv."


def drawn_numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that the curves are drawn from."""
    return table[table["metric"].isin(["recovery", "preference_odds_change", "degeneration"])].reset_index(drop=True)


def shown_table(table: pd.DataFrame, effects: pd.DataFrame, labels: Mapping[str, str]) -> pd.DataFrame:
    """The table for the page, as text: a line for each direction and vector, where v* is best or at the vector's one site."""
    lines = []
    own = effects[effects["control"] == RANDOM]
    n_sites = own.groupby(["direction", "vector"])["site"].transform("nunique")
    own = own[(own["site"] == own["direction"].map({d: best_site(table, d) for d in GOALS})) | (n_sites == 1)]
    for keys, rows in own.groupby(["direction", "vector", "site"], sort=False):
        direction, vector, site = map(str, keys)
        at_norm = rows[(rows["metric"] == "recovery") & (rows["equal"] == EQUAL_NORM)].iloc[0]
        at_kl = rows[(rows["metric"] == "preference_odds") & (rows["equal"] == EQUAL_KL)].iloc[0]
        has_text = not rows_of(table, direction, vector, site, "degeneration").empty
        past = ceiling(table, direction, vector, site)
        lines.append(
            {
                "vector": f"{labels.get(vector, vector)}, {how(table, direction)}",
                "site": short_site(site),
                "R": as_text(at_norm["value"], ".2f"),
                "R − random": _difference(at_norm, "+.2f"),
                "verdict": at_norm["verdict"],
                "margin − random, equal KL": _difference(at_kl, "+.1f"),
                "degenerate from": "–" if not has_text else "none" if past is None else f"λ = {past:g}",
            }
        )
    return pd.DataFrame(lines)


def _difference(row: pd.Series, form: str) -> str:
    if not math.isfinite(row["difference"]):
        return "–"
    low, high = (as_text(row[end], form) for end in ("ci_low", "ci_high"))
    return f"{as_text(row['difference'], form)} ({low} … {high})"


def _interval(table: pd.DataFrame, effects: pd.DataFrame, settings: Mapping[str, Any]) -> str:
    """Interval of the headline figures, and how all intervals of the section are made."""
    parts = []
    for direction in GOALS:
        row = _of_v_star(effects, direction, best_site(table, direction)).iloc[0]
        parts.append(f"{how(table, direction)} at {site_name(row['site'])}: {_difference(row, '+.2f')}")
    return (
        f"R of v* less that of random vectors, {'; '.join(parts)}. Beside the curves, 95\u00a0% intervals over the prompts of "
        f"{settings['n_test']} pairs. Bars beside random vectors: where one more of these may lie, or the prompts’ interval where "
        "that is wider; each is of one comparison, none is corrected for their number, so that by chance one in forty is called "
        "above and one in forty below."
    )


def _limits(vectors: pd.DataFrame, labels: Mapping[str, str]) -> list[str]:
    lines = [
        "That the model still works where the margin grows: a vector can raise it while text falls apart. Look at R and at "
        "degeneration at the same λ.",
        "That the answers are better: R and the margin are taken on given answers, and degeneration is all that is asked of "
        "the text, unless a judge was.",
    ]
    of_runs = vectors[(vectors["kind"] == V_STAR) & (vectors["source"] != "")] if "kind" in vectors else vectors
    if others := [labels[name] for name in dict.fromkeys(of_runs.get("vector", ()))]:
        lines.append(f"More than one training of each: {', '.join(others)} and this v* are of one run each.")
    else:
        lines.append(
            "That preferences matter: v* of a run trained on chosen responses alone (SFT) or on shuffled labels may do as much; "
            "steering.controls=[RUN] adds it to the vectors."
        )
    return lines


def _reading(
    table: pd.DataFrame, effects: pd.DataFrame, settings: Mapping[str, Any], labels: Mapping[str, str]
) -> list[str]:
    drawn, there = drawn_sites(table), list(dict.fromkeys(table["site"]))
    text = f" and the completions of {settings['n_generated']} test prompts at most" if settings["n_generated"] else ""
    first = {
        d: value_at(table, d, V_STAR, best_site(table, d), "recovery_first_token", compared_at(table)) for d in GOALS
    }
    operator = table["operator"].iloc[0]
    lines = [
        f"v* is the mean change of the hidden state at {settings['position']} over {settings['n_estimation']} held-out pairs; "
        f"every number is of {settings['n_test']} other pairs{text}, whose prompts it has not seen. {_LENGTHS[settings['norm']]} "
        "Where v* is best was chosen on the pairs that it was estimated on.",
        f"R = 1 − KL(goal ‖ steered) / KL(goal ‖ unsteered) over the tokens of the chosen responses: 0 is the model that steering "
        "starts from, 1 the one that it aims at, below 0 is further away. "
        f"Drawn down to {as_text(LOWEST, '.0f')} (arrows: what is further away); dashed: the goal.",
        *([LAMBDA[operator]] if operator in LAMBDA else []),
        f"Each vector is {how(table, 'interpolation')} {_TOKENS[settings['tokens']]}: the same tokens on given "
        "answers and in text that is generated.",
        f"At the first token of a response alone v* has R = {as_text(first['interpolation'], '.2f')} added and "
        f"{as_text(first['inversion'], '.2f')} subtracted, at its best site and λ = {compared_at(table):g}: column metric, "
        "recovery_first_token. Where it is far above R, one vector does not fit all tokens.",
        "Preference margin: log π(chosen) − log π(rejected), summed over tokens; with chosen and rejected as the polarity pair "
        "it is PrefOdds (column metric: preference_odds). Drawn: its change from λ = 0, paired (preference_odds_change).",
        f"Grey: where 95\u00a0% of random vectors lie that are as long as v*, by {how_many(settings['n_random'])} of them.",
        counted_verdicts(effects),
        *_vectors_and_files(settings, labels),
    ]
    if settings["n_generated"]:
        lines.insert(
            6,
            "Degenerate: a completion that is empty or repeats itself. Where their share is more than 10 points above the "
            f"unsteered model’s, and an exact test at the level of {COLLAPSE_LEVEL:.0%} on {settings['n_texts']} texts says "
            f"that it is above it, a vector is not compared (×): {COLLAPSED}. Random vectors are screened likewise: of the prompts "
            "each has another draw.",
        )
        if settings["n_texts"] < _ENOUGH_TEXTS:
            lines.insert(
                7,
                f"Text of {settings['n_texts']} prompts is little to see a collapse by: {_ENOUGH_TEXTS} or more are advised "
                "(steering.n_generated, datamodule.probe_pairs).",
            )
    lines += judge_of_sweep(table)
    if len(drawn) < len(there):
        lines.append(f"Drawn: the {len(drawn)} sites of {len(there)} where v* recovers most; the tables have all.")
    return lines


def _vectors_and_files(settings: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    named = [f"{labels.get(x, x)}: {settings['made'][x]}" for x in settings["vectors"] if x not in RANDOM_KINDS]
    return [
        "Adding v at the final norm’s output is a logit bias, W_U v, the same numbers whatever the context: nothing that it does "
        "there depends on the prompt.",
        f"Vectors: {'; '.join(named)}. They are in "
        f"vectors/{VECTORS_FILE} beside the tables, their lengths and cosines with v* in {VECTORS}.",
        f"All metrics are in {TABLE}, what each pair adds in {PAIRS}, the settings in {SETTINGS}: run the command again and it "
        "goes on where it stopped.",
    ]


def _of_v_star(effects: pd.DataFrame, direction: str, site: str) -> pd.DataFrame:
    """R of v* beyond random vectors at a site."""
    rows = effects[(effects["metric"] == "recovery") & (effects["control"] == RANDOM) & (effects["vector"] == V_STAR)]
    return rows[(rows["direction"] == direction) & (rows["site"] == site)]


def _headline(table: pd.DataFrame, effects: pd.DataFrame, direction: str) -> Headline:
    best, strength = best_site(table, direction), compared_at(table)
    found = beside_random(table, direction, best, "recovery", strength)
    verdict = _of_v_star(effects, direction, best)["verdict"].iloc[0]
    return Headline(
        as_text(found.value, "percent"),
        f"of the way to the {GOALS[direction]} by v* alone",
        f"{site_name(best)}, λ = {strength:g}, its best site on other pairs; {random_span(found)}: {verdict}. {TABLE}, metric "
        "recovery.",
    )


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
    done, goal = f"{doing(table, direction)} at {site_name(best)}", f"the {GOALS[direction]} at λ = {strength:g}"
    if found.value < 0:
        return f"{done} leads away from {goal}: R is {as_text(found.value, 'percent')}, {random_span(found)}"
    return f"{done} recovers {as_text(found.value, 'percent')} of the way to {goal}; {random_span(found)}"


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
        f"{site_name(best)} {words(table, direction)} at λ = {strength:g}, {as_text(goal, '+.1f')} in the {GOALS[direction]}"
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
        return f"{doing(table, direction)} breaks no more than {more} up to λ = {table['lambda'].max():g}"
    first = min(found, key=found.__getitem__)
    fired = rules_fired(lambda name: value_at(table, direction, V_STAR, first, name, found[first]))
    return (
        f"{doing(table, direction)} breaks more than {more} from λ = {found[first]:g} on, at {site_name(first)} "
        f"(by rule: {fired})"
    )


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
        for site, look in zip(sites, SITE_LOOKS, strict=False)
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
            label=f"{NAMES.get(vector, vector)} {short_site(site)}",
        )
    room = (high - low) * _ASIDE * (len(curves) + 1) / 2
    axes.set_xlim(low - room, high + room)
    axes.set_xlabel("λ (1: the vector at its own length)")


def _random_bands(
    table: pd.DataFrame, direction: str, metric: str, sites: Sequence[str]
) -> list[tuple[float, float, float]]:
    """Prediction interval of random vectors by λ, from the lowest to the highest of the sites."""
    found = []
    for strength in sorted(rows_of(table, direction, RANDOM, None, metric)["lambda"].unique()):
        drawn = [torch.tensor([controls_at(table, direction, site, metric, strength)]).double() for site in sites]
        spans = [among_random(one[:, 0], one).prediction for one in drawn if one.numel()]
        if spans:
            found.append((strength, min(span.low for span in spans), max(span.high for span in spans)))
    return found


def drawn_sites(table: pd.DataFrame) -> list[str]:
    """The best sites, in the order of the table."""
    best = set(sites_by_recovery(table, "interpolation")[:_SITES_DRAWN])
    return [site for site in dict.fromkeys(table["site"]) if site in best]
