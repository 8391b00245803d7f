"""How many directions are more than noise? Singular values beside the Marchenko–Pastur edge and parallel analysis (control C14)."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.figures import (
    COLOURS,
    EndLabel,
    house_style,
    label_ends,
    mark_level,
    new_figure,
    set_titles,
    use_log_scale,
)
from analysis.observations import site_name
from analysis.report import Section
from analysis.site_axes import SITES_LABEL, extremes, finish_sites, last_value, plot_sites, prepare_sites
from analysis.stored_rows import StoredRows
from analysis.stored_spectra import spectra_of
from tiltmeter.geometry import row_geometry
from tiltmeter.stats.nulls import marchenko_pastur_edge, noise_variance, parallel_analysis, signal_rank

N_DRAWN = 20
"""Components of the scree plot."""
N_PERMUTATIONS = 20
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
    """Marchenko–Pastur edge of the centred rows."""
    n_above_edge: int
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
    size = {"n_rows": len(update), "d_model": update.shape[1]}
    variance = noise_variance(centred, **size)
    edge = math.sqrt(len(update) * marchenko_pastur_edge(**size, noise_variance=variance))
    above = (centred > null).tolist()
    table = {"raw": raw[:n], "centred": centred[:n], "null": null[:n]}
    return Scree(
        site,
        pd.DataFrame({"component": range(1, n + 1)} | {name: (x / raw[0]).numpy() for name, x in table.items()}),
        edge / float(raw[0]),
        signal_rank(centred, **size) if variance == variance else 0,
        above.index(False) if False in above else len(above),
    )


def signal_rank_section(rows: StoredRows, spectra: pd.DataFrame) -> Section | None:
    """The section ``signal_rank``; None where nothing changed at the deepest site.

    Args:
        spectra: :func:`analysis.stored_spectra.spectra_table` of the rows.
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
        interval=f"None of the counts. The null of parallel analysis is its 95 % quantile over {N_PERMUTATIONS} permutations.",
        limits=[
            "What the directions do, or that they are preference: hidden states spread unequally, so values above the edge are "
            "expected of any training. How many more than in a control run is the question.",
            "Weak directions: what lies below the edge may be there and is not told from noise.",
        ],
        figure=figure,
        table=drawn.table.assign(site=drawn.site, edge=drawn.edge),
        reading=_reading(rows),
        headlines=[],
    )


def draw_ranks(axes: Axes, spectra: pd.DataFrame) -> str:
    """Singular values above the Marchenko–Pastur edge, of the centred rows of each matrix."""
    labels, of_update, sites = [], pd.Series(dtype=float), list(dict.fromkeys(spectra["site"]))
    prepare_sites(axes, sites)
    for matrix, (name, colour) in _MATRICES.items():
        found = spectra_of(spectra, matrix, "centred")["signal_rank"]
        of_update = found if matrix == "update" else of_update
        plot_sites(axes, sites, found, colour=colour)
        labels.append(EndLabel(last_value(found), name, colour))
    axes.set_ylim(0, 1.08 * max(1.0, axes.get_ylim()[1]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_ylabel("values above the edge")
    axes.set_xlabel(SITES_LABEL)
    finish_sites(axes, sites, labels)
    n = int(spectra_of(spectra, "update", "centred")["n"].iloc[0])
    return f"Of {n} rows’ ΔH, centred, {extremes(sites, of_update, '.0f')} singular values lie above the Marchenko–Pastur edge"


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
        f"At {site_name(drawn.site)}, {_directions(drawn.n_above_null)} more than independent dimensions would leave after "
        f"centring; {drawn.n_above_edge} above the Marchenko–Pastur edge"
    )


def _directions(n: int) -> str:
    return {0: "no direction holds", 1: "1 direction holds"}.get(n, f"{n} directions hold")


def _reading(rows: StoredRows) -> list[str]:
    return [
        f"ΔH: change of each pair’s hidden state at {rows.position}, base to {rows.snapshot}, {rows.n_rows} rows; base, policy: "
        "the states themselves. All less their mean row, but for the line “raw”.",
        "Marchenko–Pastur edge: the largest singular value of independent, equal entries that are as large as the median "
        "singular value says. spectra.csv (section singular_values) has the edge and the count for every matrix and variant.",
        "Second panel, grey, “permuted”: up to the 95 % quantile when each dimension is permuted on its own (parallel analysis), "
        "which keeps unequal dimensions unequal.",
        *rows.notes(),
    ]
