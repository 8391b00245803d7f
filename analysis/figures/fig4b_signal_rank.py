"""How many directions are more than noise? Signal ranks at a level of 5 %, and singular values beside their nulls (control C14)."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.figures.stored_spectra import spectra_of
from analysis.open.observations import site_name
from analysis.open.stored_rows import StoredRows
from analysis.report.page import Section
from analysis.report.site_axes import SITES_LABEL, extremes, finish_sites, last_value, plot_sites, prepare_sites
from analysis.report.style import (
    COLOURS,
    EndLabel,
    house_style,
    label_ends,
    mark_level,
    new_figure,
    set_titles,
    use_log_scale,
)
from tiltmeter.geometry.rows import row_geometry
from tiltmeter.stats.nulls import (
    noise_variance,
    parallel_analysis,
    signal_rank_correlated,
    signal_rank_white,
    tracy_widom_edge,
)

N_DRAWN = 20
"""Components of the scree plot."""
N_PERMUTATIONS = 19
_MATRICES = {
    "update": ("ΔH", COLOURS["policy_dark"]),
    "base": ("base", COLOURS["base"]),
    "policy": ("policy", COLOURS["policy"]),
}
_GREY = COLOURS["mark"]


class Scree(NamedTuple):
    """Singular values at one site, over σ₁ of the raw update, and what noise would give in their place."""

    site: str
    table: pd.DataFrame
    """component, raw, centred, null (parallel analysis, of the centred rows)."""
    edge: float
    """Which the largest of white noise is above in one of twenty sets: of the centred rows."""
    rank: int
    """Directions that stand apart from noise with correlated dimensions."""
    rank_white: int
    """Directions above white noise."""
    n_above_null: int
    """Leading centred values above their null; the first that isn't ends the count."""


def scree(rows: StoredRows, site: str) -> Scree | None:
    """The first singular values at one site with their nulls; None where nothing changed."""
    update = rows.update(site)
    raw = row_geometry(update).singular_values
    if not bool(raw[0] > 0):
        return None
    centred = row_geometry(update, "centred").singular_values
    null = parallel_analysis(update, n_permutations=N_PERMUTATIONS)
    n = min(N_DRAWN, len(raw))
    size = {"n_rows": len(update) - 1, "d_model": update.shape[1]}
    variance = noise_variance(centred, **size)
    edge = math.sqrt(size["n_rows"] * tracy_widom_edge(**size, noise_variance=variance))
    above = (centred > null).tolist()
    table = {"raw": raw[:n], "centred": centred[:n], "null": null[:n]}
    return Scree(
        site,
        pd.DataFrame({"component": range(1, n + 1)} | {name: (x / raw[0]).numpy() for name, x in table.items()}),
        edge / float(raw[0]),
        signal_rank_correlated(update),
        signal_rank_white(centred, **size),
        above.index(False) if False in above else len(above),
    )


def signal_rank_section(rows: StoredRows, spectra: pd.DataFrame) -> Section | None:
    """The section ``signal_rank``; None where nothing changed at the deepest site.

    Args:
        spectra: :func:`analysis.figures.stored_spectra.spectra_table` of the rows.
    """
    drawn = scree(rows, rows.sites[-1])
    if drawn is None:
        return None
    with house_style():
        figure, axes = new_figure(2, panel_height_cm=6.0)
        sentences = [draw_ranks(axes[0], spectra), draw_scree(axes[1], drawn)]
        set_titles(figure, axes, sentences)
    return Section(
        name="signal_rank",
        question="How many directions are more than noise?",
        claim="D-STEER, Fig. 4b, reads a small σ₂/σ₁ as rank one; then nothing but the shift should rise above noise.",
        sentences=sentences,
        interval="None of the counts: each has a level of 5 %, the chance of a count above 0 in noise of its kind.",
        limits=[
            "What the directions do, or that they are preference: how many more than in a control run is the question.",
            "Weak directions, and those of a spectrum that falls off evenly, like a power law: they may be there and are not told "
            "from noise.",
            "The count against white noise where dimensions are correlated, as hidden states’ are: noise alone has dozens then.",
        ],
        figure=figure,
        table=drawn.table.assign(site=drawn.site, edge=drawn.edge),
        reading=_reading(rows),
        headlines=[],
    )


def draw_ranks(axes: Axes, spectra: pd.DataFrame) -> str:
    """Signal rank of the centred rows of each matrix, against noise whose dimensions may be correlated."""
    labels, of_update, sites = [], pd.Series(dtype=float), list(dict.fromkeys(spectra["site"]))
    prepare_sites(axes, sites)
    for matrix, (name, colour) in _MATRICES.items():
        found = spectra_of(spectra, matrix, "centred")["signal_rank"]
        of_update = found if matrix == "update" else of_update
        plot_sites(axes, sites, found, colour=colour)
        labels.append(EndLabel(last_value(found), name, colour))
    axes.set_ylim(0, 1.08 * max(1.0, axes.get_ylim()[1]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_ylabel("directions beyond noise")
    axes.set_xlabel(SITES_LABEL)
    finish_sites(axes, sites, labels)
    update = spectra_of(spectra, "update", "centred")
    return (
        f"Of {int(update['n'].iloc[0])} rows’ ΔH, centred, {extremes(sites, of_update, '.0f')} directions stand apart from noise "
        f"with correlated dimensions; against white noise it would be {extremes(sites, update['signal_rank_white'], '.0f')}"
    )


def draw_scree(axes: Axes, drawn: Scree) -> str:
    """The first singular values at the deepest site, raw and centred, over parallel analysis and the edge."""
    table, blue, navy = drawn.table, COLOURS["policy"], COLOURS["policy_dark"]
    at = table["component"]
    axes.set_xlim(0.4, len(table) + 0.6)
    use_log_scale(axes)
    axes.fill_between(at, table["null"].clip(lower=1e-6), 1e-6, color=COLOURS["null"], alpha=0.45, linewidth=0)
    raw, centred = (table[name].where(table[name] > 0) for name in ("raw", "centred"))
    axes.plot(at, raw, color=navy, marker="o", markersize=2.5)
    axes.plot(at, centred, color=blue, linestyle="--", marker="o", markersize=2.5)
    shown = np.concatenate([table["raw"], table["centred"], table["null"], [drawn.edge]])
    axes.set_ylim(max(float(shown[shown > 0].min()) / 2, 1e-4), 1.6)
    labels = [
        EndLabel(last_value(raw), "raw", navy),
        EndLabel(last_value(centred), "centred", blue),
        EndLabel(float(table["null"].iloc[-1]), "permuted", _GREY),
    ]
    if drawn.edge == drawn.edge:
        mark_level(axes, drawn.edge)
        labels.append(EndLabel(drawn.edge, "edge", _GREY))
    axes.set_ylabel("σ / σ₁ of the raw update")
    axes.set_xlabel("component")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    label_ends(axes, [label for label in labels if label.y > 0], room=0.26)
    return (
        f"At {site_name(drawn.site)}, after centring, {drawn.rank} stand apart from correlated noise; "
        f"{_directions(drawn.n_above_null)} more than independent dimensions would, {drawn.rank_white} more than white noise"
    )


def _directions(n: int) -> str:
    return {0: "no direction holds", 1: "1 direction holds"}.get(n, f"{n} directions hold")


def _reading(rows: StoredRows) -> list[str]:
    return [
        f"ΔH: change of each pair’s hidden state at {rows.position}, base to {rows.snapshot}, {rows.n_rows} rows; base, policy: "
        "the states themselves. All less their mean row, but for the line “raw”.",
        "First panel: a gap below the leading values that noise of any covariance, also with heavy tails, leaves in one of twenty "
        "sets (after Onatski 2009; at most 10). White noise: one after the other above the Tracy–Widom quantile (Kritchman and "
        "Nadler 2008), dashed in the second panel. Real error rates: docs/statistics.md. spectra.csv (section singular_values) has "
        "both.",
        f"Second panel, grey, “permuted”: the largest of {N_PERMUTATIONS} times that each dimension is permuted on its own "
        "(parallel analysis), which keeps unequal dimensions unequal.",
        *rows.notes(),
    ]
