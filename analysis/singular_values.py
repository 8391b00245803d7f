"""Is the update of rank one, layer by layer? Singular values of ΔH under the controls, beside what noise alone would give."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.figures import COLOURS, EndLabel, house_style, mark_level, new_figure, set_titles, use_log_scale
from analysis.observations import site_name
from analysis.report import Section
from analysis.site_axes import SITES_LABEL, extremes, finish_sites, last_value, plot_sites, prepare_sites
from analysis.stored_rows import StoredRows
from tiltmeter.geometry import VARIANTS, RowGeometry, Variant, row_geometry
from tiltmeter.nulls import marchenko_pastur_edge, noise_variance, parallel_analysis, signal_rank

N_LISTED = 5
"""σ₁ … σ₅ have a column each, as in the paper's Fig. 4b."""
N_DRAWN = 20
"""Components of the scree plot."""
CLAIM = 0.1
"""The paper says that σ₂/σ₁ is below."""
_STYLES: dict[Variant, tuple[str, str, str]] = {
    "raw": ("-", COLOURS["policy_dark"], "raw"),
    "centred": ("--", COLOURS["policy"], "centred"),
    "unit_row": (":", COLOURS["policy_dark"], "unit rows"),
    "outlier_dims_removed": ("-.", COLOURS["policy"], "no outliers"),
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


def singular_value_section(rows: StoredRows) -> Section | None:
    """The section ``singular_values``, with the table ``spectra``; None where nothing changed."""
    spectra = spectra_table(rows)
    update = spectra[spectra["matrix"] == "update"]
    drawn = scree(rows, rows.sites[-1])
    if drawn is None or update["sigma_ratio"].isna().all():
        return None
    with house_style():
        figure, axes = new_figure(4, panel_height_cm=5.4)
        sentences = [
            draw_listed(axes[0], _of(update, "raw")),
            draw_ratios(axes[1], update),
            draw_alignment(axes[2], update),
            draw_scree(axes[3], drawn),
        ]
        axes[2].set_xlabel(SITES_LABEL)
        set_titles(figure, axes, sentences)
    return Section(
        name="singular_values",
        question="Is the update of rank one?",
        sentences=sentences,
        figure=figure,
        table=drawn.table.assign(site=drawn.site, edge=drawn.edge),
        reading=_reading(rows, drawn),
        headlines=[],
        more_tables={"spectra": spectra},
    )


def spectra_table(rows: StoredRows) -> pd.DataFrame:
    """Every figure of the spectrum of {update, base, policy} × {raw, centred, unit_row, outlier_dims_removed} at each site."""
    found = []
    for site in rows.sites:
        matrices = {"update": rows.update(site), "base": rows.base[site], "policy": rows.policy[site]}
        for matrix, values in matrices.items():
            for variant in VARIANTS:
                where = {"snapshot": rows.snapshot, "position": rows.position, "site": site, "matrix": matrix}
                found.append(where | {"variant": variant} | _figures(row_geometry(values, variant)))
    return pd.DataFrame(found)


def _figures(geometry: RowGeometry) -> dict[str, float]:
    sigma, s = geometry.singular_values, geometry.spectrum
    size = {"n_rows": s.n_rows, "d_model": s.d_model}
    listed = {f"sigma_{k + 1}": float(sigma[k]) if k < len(sigma) else math.nan for k in range(N_LISTED)}
    variance = noise_variance(sigma, **size)
    known = variance == variance and bool(sigma.isfinite().all())
    edge = math.sqrt(s.n_rows * marchenko_pastur_edge(**size, noise_variance=variance)) if known else math.nan
    rank = signal_rank(sigma, **size, variance=variance) if known else math.nan
    shared = {"shift_share": geometry.shift_share, "cos_top_mean": geometry.cos_top_mean}
    return s._asdict() | listed | shared | {"marchenko_pastur_edge": edge, "signal_rank": rank}


def scree(rows: StoredRows, site: str) -> Scree | None:
    """The first singular values at one site with their nulls; None where nothing changed."""
    update = rows.update(site)
    raw = row_geometry(update).singular_values
    if not bool(raw[0] > 0):
        return None
    centred = row_geometry(update, "centred").singular_values
    null = parallel_analysis(update)
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


def draw_listed(axes: Axes, raw: pd.DataFrame) -> str:
    """σ₂ … σ₅ over σ₁ of the raw update."""
    sites = raw["site"].tolist()
    prepare_sites(axes, sites)
    mark_level(axes, CLAIM)
    labels = [EndLabel(CLAIM, "paper", _GREY)]
    for k, style in zip(range(2, N_LISTED + 1), ("-", "--", "-.", ":"), strict=True):
        ratio = raw[f"sigma_{k}"] / raw["sigma_1"]
        colour = COLOURS["policy_dark" if k == 2 else "policy"]
        plot_sites(axes, sites, ratio, style=style, colour=colour)
        labels.append(EndLabel(last_value(ratio), f"σ{'₂₃₄₅'[k - 2]}", colour))
    axes.set_ylim(0, max(0.15, axes.get_ylim()[1]))
    axes.set_ylabel("σ / σ₁, raw")
    finish_sites(axes, sites, labels, room=0.2)
    return f"The second singular value is {extremes(sites, raw['sigma_ratio'], '.2f')} of the first"


def draw_ratios(axes: Axes, update: pd.DataFrame) -> str:
    """σ₂/σ₁ under each control."""
    sites = _of(update, "raw")["site"].tolist()
    prepare_sites(axes, sites)
    mark_level(axes, CLAIM)
    labels = [EndLabel(CLAIM, "paper", _GREY)]
    for variant, (style, colour, name) in _STYLES.items():
        values = _of(update, variant)["sigma_ratio"]
        plot_sites(axes, sites, values, style=style, colour=colour)
        labels.append(EndLabel(last_value(values), name, colour))
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("σ₂ / σ₁")
    finish_sites(axes, sites, labels, room=0.3)
    centred = _of(update, "centred")["sigma_ratio"]
    n_raw, n_centred = (int((_of(update, v)["sigma_ratio"] < CLAIM).sum()) for v in ("raw", "centred"))
    return (
        f"σ₂/σ₁ is below {CLAIM} at {n_raw} of {len(sites)} sites, and at {n_centred} once the mean row is taken out: "
        f"then {extremes(sites, centred, '.2f')}"
    )


def draw_alignment(axes: Axes, update: pd.DataFrame) -> str:
    """|cos(u₁, v*)|, of the variants that keep their mean."""
    raw = _of(update, "raw")
    sites = raw["site"].tolist()
    prepare_sites(axes, sites)
    labels = []
    for variant in ("raw", "unit_row", "outlier_dims_removed"):
        style, colour, name = _STYLES[variant]
        values = _of(update, variant)["cos_top_mean"]
        plot_sites(axes, sites, values, style=style, colour=colour)
        labels.append(EndLabel(last_value(values), name, colour))
    root = raw["shift_share"].where(raw["shift_share"] > 0.5) ** 0.5
    plot_sites(axes, sites, root, style=(0, (1, 2)), colour=_GREY)  # type: ignore[arg-type]
    labels.append(EndLabel(last_value(root), "√f", _GREY))
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("|cos(u₁, v*)|")
    finish_sites(axes, sites, labels, room=0.3)
    return f"The cosine of the first direction and v* is {extremes(sites, raw['cos_top_mean'], '.3f')}"


def draw_scree(axes: Axes, drawn: Scree) -> str:
    """The first singular values at the deepest site, raw and centred, over parallel analysis and the edge."""
    table = drawn.table
    at = table["component"]
    axes.set_xlim(0.4, len(table) + 0.6)
    use_log_scale(axes)
    axes.fill_between(at, table["null"].clip(lower=1e-6), 1e-6, color=COLOURS["null"], alpha=0.45, linewidth=0)
    axes.plot(at, table["raw"].where(table["raw"] > 0), color=COLOURS["policy_dark"], marker="o", markersize=2.5)
    centred = table["centred"].where(table["centred"] > 0)
    axes.plot(at, centred, color=COLOURS["policy"], linestyle="--", marker="o", markersize=2.5)
    if drawn.edge == drawn.edge:
        mark_level(axes, drawn.edge)
        axes.text(len(table) + 0.5, drawn.edge * 1.06, "edge", color=_GREY, ha="right", va="bottom", weight="bold")
    shown = np.concatenate([table["raw"], table["centred"], table["null"], [drawn.edge]])
    low = float(shown[shown > 0].min())
    axes.set_ylim(max(low / 2, 1e-4), 1.6)
    axes.text(1.5, 1.0, "raw", color=COLOURS["policy_dark"], va="center", weight="bold")
    axes.text(2.2, float(centred.iloc[0]) * 1.25, "centred", color=COLOURS["policy"], va="bottom", weight="bold")
    band = float(table["null"].iloc[0])
    axes.text(1, 0.7 * band, "independent dimensions", color=_GREY, va="top", weight="bold")
    axes.set_ylabel("σ / σ₁ of the raw update")
    axes.set_xlabel("component")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return (
        f"At {site_name(drawn.site)}, {_directions(drawn.n_above_null)} more than independent dimensions would leave after "
        f"centring; {drawn.n_above_edge} above the Marchenko–Pastur edge"
    )


def _directions(n: int) -> str:
    return {0: "no direction holds", 1: "1 direction holds"}.get(n, f"{n} directions hold")


def _of(update: pd.DataFrame, variant: Variant) -> pd.DataFrame:
    return update[update["variant"] == variant].reset_index(drop=True)


def _reading(rows: StoredRows, drawn: Scree) -> list[str]:
    size = f"{rows.n_rows} rows of width {len(rows.base[drawn.site][0])}"
    return [
        f"ΔH: change of each pair’s hidden state at {rows.position}, base to {rows.snapshot}; {size}. σ₁ ≥ σ₂ … its singular "
        f"values, u₁ its first direction, v* its mean row. Dashed grey: {CLAIM}, below which the paper finds σ₂/σ₁.",
        "Centred: less the mean row. Unit rows: each over its length, so that no few long rows decide. No outliers: without the "
        "1 % of dimensions of largest |mean|.",
        "Not independent evidence: with f the share of one constant shift, σ₁² holds at least f of ΔH, and f > ½ makes "
        "|cos(u₁, v*)| at least √f (grey). A small σ₂/σ₁ and u₁ ≈ v* repeat f; centred, the ratio is news.",
        "Last panel, grey: up to the 95 % quantile when each dimension is permuted on its own (parallel analysis). Dashed: the "
        "Marchenko–Pastur edge of independent, equal entries as large as the median singular value says.",
        "Not shown: what the directions do. Hidden states spread unequally, so values above the edge are expected of any training; "
        "how many more than in a control run is the question. spectra.csv has every figure, also of the states themselves.",
        *rows.notes(),
    ]
