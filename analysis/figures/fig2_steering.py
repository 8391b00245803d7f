"""The report's section on steering: Figures 2a and 2b of the paper from the sweep's tables alone, beside their controls."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.controls.c15_random_vectors import (
    COLLAPSE_LEVEL,
    COLLAPSED,
    EQUAL_KL,
    EQUAL_NORM,
    VERDICTS,
    steering_effects,
)
from analysis.figures.fig2_panels import (
    GOALS,
    HOW,
    LOWEST,
    beside_random,
    best_site,
    ceiling,
    compared_at,
    draw_degeneration,
    draw_effects,
    draw_preference,
    draw_recovery,
    drawn_sites,
    random_span,
    rows_of,
    short_site,
    value_at,
    vector_name,
)
from analysis.open.observations import site_name
from analysis.report.page import Headline, Section
from analysis.report.site_axes import Panel, as_text
from analysis.report.style import house_style, new_figure, set_titles
from analysis.steering.directions import RANDOM, RANDOM_KINDS, V_STAR
from analysis.steering.sweep import CHOOSING
from analysis.steering.table import PAIRS, SETTINGS, TABLE, read_pairs, read_settings, read_sweep

NAME = "steering_sweep"
EFFECTS = "steering_effects"
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


def steering_section_of(tables: Path) -> Section | None:
    """The section of a folder of tables; None where nothing was swept.

    Raises:
        UserError: a table is damaged; names the file.
    """
    if not (tables / TABLE).exists():
        return None
    settings = read_settings(tables)
    return steering_section(read_sweep(tables / TABLE), read_pairs(tables / PAIRS), settings)


def steering_section(table: pd.DataFrame, pairs: pd.DataFrame, settings: Mapping[str, Any]) -> Section | None:
    """The section ``steering_sweep``; None where no sweep has got as far as one vector and its controls in both directions.

    Args:
        table: :func:`analysis.steering.table.read_sweep`.
        pairs: :func:`analysis.steering.table.read_pairs`.
        settings: that they were made with.
    """
    if any(rows_of(table, direction, V_STAR, None, CHOOSING).empty for direction in GOALS):
        return None
    effects = steering_effects(pairs, table, strength=compared_at(table))
    if any(_of_v_star(effects, direction, best_site(table, direction)).empty for direction in GOALS):
        return None
    panels: list[Panel] = []
    for direction in GOALS:
        about = {"direction": direction, "sites": drawn_sites(table), "site": best_site(table, direction)}
        panels += [
            partial(draw_recovery, direction=direction),
            lambda axes, _, about=about: draw_effects(axes, effects, **about),  # type: ignore[misc]
            partial(draw_preference, direction=direction),
        ]
    if (table["metric"] == "degeneration").any():
        panels.append(draw_degeneration)
    with house_style():
        figure, axes = new_figure(len(panels), panel_height_cm=5.6)
        sentences = [draw(panel, table) for draw, panel in zip(panels, axes, strict=True)]
        set_titles(figure, axes, sentences)
    return Section(
        name=NAME,
        question="Does moving hidden states along one vector turn the base into the aligned model, and back?",
        claim="D-STEER, Fig. 2: moving the base’s hidden states along one vector makes its answers the aligned model’s, up to a "
        "strength from which text falls apart; subtracting v* from the aligned model gives back the base.",
        sentences=sentences,
        interval=_interval(table, effects, settings),
        limits=_limits(settings),
        figure=figure,
        table=drawn_numbers(table),
        reading=_reading(table, effects, settings),
        headlines=[_headline(table, effects, direction) for direction in GOALS],
        shown=shown_table(table, effects),
        caption=f"At λ = {compared_at(table):g}, where v* is best on other pairs, or at the vector’s one site; all sites and "
        f"comparisons are in {EFFECTS}.csv",
        more_tables={EFFECTS: effects},
    )


def drawn_numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that the curves are drawn from."""
    return table[table["metric"].isin(["recovery", "preference_odds_change", "degeneration"])].reset_index(drop=True)


def shown_table(table: pd.DataFrame, effects: pd.DataFrame) -> pd.DataFrame:
    """The table for the page, as text: a line for each direction and vector, where v* is best or at the vector's one site."""
    lines = []
    own = effects[effects["control"] == RANDOM]
    n_sites = own.groupby(["direction", "vector"])["site"].transform("nunique")
    own = own[(own["site"] == own["direction"].map({d: best_site(table, d) for d in GOALS})) | (n_sites == 1)]
    for keys, rows in own.groupby(["direction", "vector", "site"], sort=False):
        direction, vector, site = map(str, keys)
        at_norm = rows[(rows["metric"] == "recovery") & (rows["equal"] == EQUAL_NORM)].iloc[0]
        at_kl = rows[rows["equal"] == EQUAL_KL].iloc[0]
        has_text = not rows_of(table, direction, vector, site, "degeneration").empty
        past = ceiling(table, direction, vector, site)
        lines.append(
            {
                "vector": f"{vector_name(vector)}, {HOW[direction]}",
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
    """That of the headline figures, and what all intervals of the section are."""
    parts = []
    for direction in GOALS:
        row = _of_v_star(effects, direction, best_site(table, direction)).iloc[0]
        parts.append(f"{HOW[direction]} at {site_name(row['site'])}: {_difference(row, '+.2f')}")
    return (
        f"R of v* less that of random vectors, {'; '.join(parts)}. Beside the curves, 95\u00a0% intervals over the prompts of "
        f"{settings['n_test']} pairs. Bars beside random vectors: where one more of these may lie, or the prompts’ interval where "
        "that is wider; each is of one comparison, none is corrected for their number, so that by chance one in forty is called "
        "above and one in forty below."
    )


def _limits(settings: Mapping[str, Any]) -> list[str]:
    lines = [
        "That the model still works where the margin grows: a vector can raise it while text falls apart. Look at R and at "
        "degeneration at the same λ.",
        "That the answers are better: R and the margin are taken on given answers, and degeneration is all that is asked of "
        "the text, unless a judge was.",
    ]
    others = [vector_name(name) for name in settings["vectors"] if name.startswith(f"{V_STAR}_of_")]
    if others:
        lines.append(f"More than one training of each: {', '.join(others)} and this v* are of one run each.")
    else:
        lines.append(
            "That preferences matter: v* of a run trained on chosen responses alone (SFT) or on shuffled labels may do as much; "
            "steering.controls=[RUN] adds it to the vectors."
        )
    return lines


def _reading(table: pd.DataFrame, effects: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    drawn, there = drawn_sites(table), list(dict.fromkeys(table["site"]))
    text = f" and the completions of {settings['n_generated']} test prompts at most" if settings["n_generated"] else ""
    first = {
        d: value_at(table, d, V_STAR, best_site(table, d), "recovery_first_token", compared_at(table)) for d in GOALS
    }
    lines = [
        f"v* is the mean change of the hidden state at {settings['position']} over {settings['n_estimation']} held-out pairs; "
        f"every number is of {settings['n_test']} other pairs{text}, whose prompts it has not seen. {_LENGTHS[settings['norm']]} "
        "Where v* is best was chosen on the pairs that it was estimated on.",
        f"R = 1 − KL(goal ‖ steered) / KL(goal ‖ unsteered) over the tokens of the chosen responses: 0 is the model that steering "
        "starts from, 1 the one that it aims at, below 0 is further away. "
        f"Drawn down to {as_text(LOWEST, '.0f')} (arrows: what is further away); dashed: the goal.",
        f"Each vector is added {_TOKENS[settings['tokens']]}: the same tokens on given answers and in text that is generated.",
        f"At the first token of a response alone v* has R = {as_text(first['interpolation'], '.2f')} added and "
        f"{as_text(first['inversion'], '.2f')} subtracted, at its best site and λ = {compared_at(table):g}: column metric, "
        "recovery_first_token. Where it is far above R, one vector does not fit all tokens.",
        "Preference margin: log π(chosen) − log π(rejected), summed over tokens; with chosen and rejected as the polarity pair "
        "it is PrefOdds (column metric: preference_odds). Drawn: its change from λ = 0, paired (preference_odds_change).",
        f"Grey: where 95\u00a0% of random vectors lie that are as long as v*, by {_drawn(settings)} of them.",
        _verdicts(effects),
        *_vectors_and_files(settings),
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
    if len(drawn) < len(there):
        lines.append(f"Drawn: the {len(drawn)} sites of {len(there)} where v* recovers most; the tables have all.")
    return lines


def _vectors_and_files(settings: Mapping[str, Any]) -> list[str]:
    return [
        "Adding v at the final norm’s output is a logit bias, W_U v, the same numbers whatever the context: nothing that it does "
        "there depends on the prompt.",
        f"Vectors: {'; '.join(f'{vector_name(name)}: {how}' for name, how in _named(settings))}. They are in "
        f"vectors/{VECTORS_FILE} beside the tables, their lengths and cosines with v* in steering_vectors.csv.",
        f"All metrics are in {TABLE}, what each pair adds in {PAIRS}, the settings in {SETTINGS}: run the command again and it "
        "goes on where it stopped.",
    ]


def _verdicts(effects: pd.DataFrame) -> str:
    """How many comparisons of R at equal norm said what, for each random kind."""
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


def _drawn(settings: Mapping[str, Any]) -> str:
    """How many random vectors there are at a site, in words.

    >>> _drawn({"n_random": {"layer_00": 20, "final_post_norm": 99}})
    '20 to 99'
    """
    counts = sorted(set(settings["n_random"].values()))
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"


def _of_v_star(effects: pd.DataFrame, direction: str, site: str) -> pd.DataFrame:
    """What v* recovers beyond random vectors at a site."""
    rows = effects[(effects["metric"] == "recovery") & (effects["control"] == RANDOM) & (effects["vector"] == V_STAR)]
    return rows[(rows["direction"] == direction) & (rows["site"] == site)]


def _named(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, settings["made"][name]) for name in settings["vectors"] if name not in RANDOM_KINDS]


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
