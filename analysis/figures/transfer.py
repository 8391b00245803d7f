"""The report's section on transfer: v* of every site added at every site, as a matrix, beside random vectors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.figures.vector_labels import how_many
from analysis.open.observations import site_name
from analysis.report.page import Headline, Section
from analysis.report.site_axes import as_text, shown_ticks, tick_name
from analysis.report.style import COLOURS, house_style, new_figure, set_titles
from tiltmeter.steering.vector import RANDOM

NAME = "transfer"
OWN_LESS_OTHERS, OWN_LESS_RANDOM = "own_less_others", "own_less_random"
"""Sources of the rows that compare: the site's own v* less the mean of the other sites', or of the random vectors."""
_MOST_NUMBERS = 60
"""Cells up to which their numbers are written into them."""
_MOST_ROWS = 12
"""Sites up to which names of neighbours don't touch."""
_COLOUR_MAP = "PuOr_r"


def transfer_section(table: pd.DataFrame, settings: Mapping[str, Any]) -> Section:
    """The section ``transfer``.

    Args:
        table: a row for each source and site.
        settings: how it was made.
    """
    sites = list(dict.fromkeys(table["site"]))
    with house_style():
        figure, axes = new_figure(2, panel_height_cm=min(8.0, max(5.6, 3.4 + 0.35 * len(sites))))
        recovery = matrix(table, sites, "recovery")
        change = matrix(table, sites, "margin_change")
        draw_matrix(figure, axes[0], recovery, sites, name="recovery R", form=".2f", limit=1.0)
        draw_matrix(figure, axes[1], change, sites, name="change of margin, nats", form="+.1f", limit=math.inf)
        sentences = [said_of_recovery(recovery), said_of_margin(change, settings["aligned_change"])]
        set_titles(figure, axes, sentences)
    return Section(
        name=NAME,
        question="Does v* of one layer work at another?",
        claim="D-STEER: DPO’s update is a steering vector. Then v* of a layer, added there, turns the base into the aligned model.",
        sentences=sentences,
        interval=_interval(table, recovery, sites, settings["n_test"]),
        limits=[
            "Other strengths λ, for which a vector that does little here may do more, several sites at once, and what is written.",
            "A second piece of evidence where a vector works at another’s place: v* of neighbouring sites are much alike (column "
            "cosine), since blocks add to one residual stream.",
            "That DPO did nothing else: R says how far one vector goes, and v* of SFT or shuffled labels is not among the vectors.",
        ],
        figure=figure,
        table=table,
        reading=_reading(settings),
        headlines=[_headline(table, recovery, sites)],
        shown=shown_table(table, sites),
        caption="R where vectors are added: its own v*, the mean of other sites’, differences paired by prompt; 95 % intervals",
    )


def matrix(table: pd.DataFrame, sites: Sequence[str], column: str) -> np.ndarray:
    """[source, site] of a figure; the last row is what 97.5 % of the random vectors stay below."""
    grid = table.pivot_table(index="source", columns="site", values=column, dropna=False)[list(sites)]
    random = grid.loc[table.loc[table["kind"] == RANDOM, "source"].unique()].quantile(0.975)
    return np.vstack([grid.loc[list(sites)].to_numpy(dtype=float), random.to_numpy(dtype=float)])


def draw_matrix(
    figure: Figure, axes: Axes, cells: np.ndarray, sites: Sequence[str], *, name: str, form: str, limit: float
) -> None:
    """Sources from the first layer up, the diagonal framed, random vectors in a row of their own on top.

    Args:
        limit: what colours span at most; less where no cell is as large.
    """
    n, largest = len(sites), float(np.nanmax(np.abs(cells), initial=1e-6))
    limit = min(limit, largest)
    shown = axes.imshow(cells, origin="lower", aspect="auto", interpolation="nearest", cmap=_COLOUR_MAP)
    shown.set_clim(-limit, limit)
    axes.grid(visible=False)
    axes.axhline(n - 0.5, color="white", linewidth=3)
    look: dict[str, Any] = {"fill": False, "edgecolor": COLOURS["base"], "linewidth": 1.4 if n <= _MOST_ROWS else 0.7}
    for i in range(n):
        axes.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, zorder=3, **look)).set_clip_on(False)
    if cells.size <= _MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(cells):
            ink = "white" if abs(value) > 0.7 * limit else "black"
            axes.text(column, row, as_text(float(value), form), color=ink, ha="center", va="center", fontsize=6)
    bar = figure.colorbar(shown, ax=axes, pad=0.02, fraction=0.06, extend="both" if limit < largest else "neither")
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(labelsize=6)
    bar.set_label(name)
    ticks = shown_ticks(sites)
    axes.set_xticks(ticks, [tick_name(sites[i], of=sites) for i in ticks])
    rows = [i for i in ticks if i < n - 2 or n <= _MOST_ROWS]
    axes.set_yticks([*rows, n], [*(tick_name(sites[i], of=()).strip() for i in rows), "random"])
    axes.set_xlabel("added after decoder block (pre, post: around the final norm)")
    axes.set_ylabel("v* of")


def said_of_recovery(cells: np.ndarray) -> str:
    """R at v*'s own site, elsewhere, and of random vectors."""
    own, others, random = _parts(cells)
    if np.isnan(cells).all():
        return "How far v* goes has no number: base and aligned model predict the same, up to rounding"
    return (
        f"Added at its own site (framed) v* recovers {_span(own, 'percent')} of the way to the aligned model, at other sites "
        f"{_span(others, 'percent')}; one in forty random vectors more than {_span(random, 'percent')}"
    )


def said_of_margin(cells: np.ndarray, aligned_change: float) -> str:
    """Change of the preference margin: the same three, and how far there is to go."""
    own, others, random = _parts(cells)
    return (
        f"The preference margin changes by {_span(own, '+.1f')} nats at v*’s own site and {_span(others, '+.1f')} at others; "
        f"one in forty random vectors more than {_span(random, '+.1f')}, the aligned model {as_text(aligned_change, '+.1f')}"
    )


def shown_table(table: pd.DataFrame, sites: Sequence[str]) -> pd.DataFrame:
    """The table for the page, as text: what is special about a site's own vector."""
    known = table.set_index(["source", "site"])
    lines = []
    for site in sites:
        others = table[(table["site"] == site) & table["source"].isin([s for s in sites if s != site])]
        lines.append(
            {"added at": site_name(site), "own v*: R": _with_interval(known.loc[(site, site)])}
            | {"others’ v*, mean": as_text(float(others["recovery"].mean()), ".2f")}
            | {"own less others": _with_interval(known.loc[(OWN_LESS_OTHERS, site)])}
            | {"own less random": _with_interval(known.loc[(OWN_LESS_RANDOM, site)])}
            | {"verdict": known.loc[(OWN_LESS_RANDOM, site), "recovery_verdict"]}
        )
    return pd.DataFrame(lines)


def _headline(table: pd.DataFrame, cells: np.ndarray, sites: Sequence[str]) -> Headline:
    known = table.set_index(["source", "site"])["recovery_low"]
    n = sum(known[OWN_LESS_OTHERS, site] > 0 for site in sites)
    return Headline(
        "none" if np.isnan(cells).all() else f"{n} of {len(sites)}",
        "sites where their own v* recovers more than other sites’",
        f"95 % interval of the difference above 0; R of own v*: {_span(_parts(cells)[0], 'percent')}. {NAME}.csv.",
    )


def _interval(table: pd.DataFrame, cells: np.ndarray, sites: Sequence[str], n: int) -> str:
    own_cells = _parts(cells)[0]
    if np.isnan(own_cells).all():
        return f"None: over the {n} pairs, KL(aligned ‖ base), which R divides by, is no more than rounding."
    best = sites[int(np.nanargmax(own_cells))]
    known = table.set_index(["source", "site"])
    own, random = (_with_interval(known.loc[(source, best)]) for source in (best, OWN_LESS_RANDOM))
    return (
        f"R of v* at {site_name(best)}, the best of {len(sites)} sites on these same pairs: {own}; less the mean of the random "
        f"vectors there: {random}. 95\u00a0% intervals over the prompts of {n} pairs, differences paired; beside random vectors "
        "of where one more of them may lie."
    )


def _reading(settings: Mapping[str, Any]) -> list[str]:
    return [
        f"v* of a site: mean of hπ − h₀ at {settings['position']} over {settings['n_estimation']} held-out pairs. Numbers are of "
        f"{settings['n_test']} other pairs, whose prompts it has not seen.",
        "Added at λ = 1 to the base, at every token that a token of a response is predicted from; at each site all vectors, "
        "random ones too, have the length of that site’s own v*, so that only directions are compared.",
        "R = 1 − KL(aligned ‖ steered) / KL(aligned ‖ base) over the chosen responses’ tokens: 0 is the base, 1 the aligned model, "
        "below 0 further away. Margin: log π(chosen) − log π(rejected).",
        f"Top row: what 97.5\u00a0% of a site’s {how_many(settings['n_random'])} random vectors stay below. Where they recover as "
        "much, what recovers is not the direction of v*.",
        f"{NAME}.csv has every cell with its 95 % interval over prompts, and paired differences: {OWN_LESS_OTHERS}, "
        f"{OWN_LESS_RANDOM}, with the rank of v* among them (p_above, p_below) and a verdict.",
    ]


def _parts(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The diagonal, what lies off it, and the row of random vectors."""
    square = cells[:-1]
    return square.diagonal(), square[~np.eye(len(square), dtype=bool)], cells[-1]


def _span(values: np.ndarray, form: str) -> str:
    """From least to largest, as text; without numbers there is no span."""
    known = values[~np.isnan(values)]
    if not known.size:
        return "no number"
    low, high = (as_text(float(x), form) for x in (known.min(), known.max()))
    return low if low == high else f"{low} to {high}"


def _with_interval(row: pd.Series) -> str:
    value, low, high = (as_text(float(row[f"recovery{end}"]), ".2f") for end in ("", "_low", "_high"))
    return f"{value} ({low} … {high})"
