"""Spectra of stored rows under every control: {update, base, policy} × {raw, centred, unit rows, outliers removed} at each site."""

import math
from collections.abc import Mapping

import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from analysis.open.observations import site_name
from analysis.open.stored_rows import StoredRows
from analysis.report.site_axes import as_text, last_value, plot_sites
from analysis.report.style import COLOURS, EndLabel
from tiltmeter.geometry.rows import OUTLIER_MULTIPLE, VARIANTS, RowGeometry, Variant, outlier_dims, row_geometry
from tiltmeter.stats.nulls import noise_variance, signal_rank_correlated, signal_rank_white, tracy_widom_edge

N_LISTED = 5
"""σ₁ … σ₅ are told one by one, as in the paper's Fig. 4b."""
_WHERE = ("snapshot", "position", "site", "matrix", "variant")
_SIZE = ("n", "d_model")
_RANKS = ("tracy_widom_edge", "signal_rank", "signal_rank_white")
LOOKS: Mapping[Variant, tuple[str, str, str]] = {
    "raw": ("-", COLOURS["policy_dark"], "raw"),
    "centred": ("--", COLOURS["policy"], "centred"),
    "unit_row": (":", COLOURS["policy_dark"], "unit rows"),
    "outlier_dims_removed": ("-.", COLOURS["policy"], "no outliers"),
}
"""Variant → line style, colour where it stands for ΔH, and name."""
VARIANTS_NOTE = (
    "Centred: less the mean row. Unit rows: each over its length, so that no few long rows decide. No outliers: without the "
    f"dimensions in which the base’s |mean| is over {OUTLIER_MULTIPLE:.0f} × the median one (the same for ΔH, base and policy), "
    "chosen on a third of the pairs and told of the others."
)


def spectra_table(rows: StoredRows) -> pd.DataFrame:
    """A row for each site, matrix and variant; a column for each figure, and N and d beside them.

    Singular values in activation units, entropies in nats, ``tracy_widom_edge`` as a singular value. ``signal_rank`` allows for
    correlated dimensions and heavy tails, ``signal_rank_white`` for neither; both of centred rows, NaN of others.
    """
    found = []
    for site in rows.sites:
        matrices = {"update": rows.update(site), "base": rows.base[site], "policy": rows.policy[site]}
        without, told = outlier_dims(rows.base[site])
        for matrix, values in matrices.items():
            for variant in VARIANTS:
                where = (rows.snapshot, rows.position, site, matrix, variant)
                kept = values[told] if variant == "outlier_dims_removed" else values
                geometry = row_geometry(kept, variant, without=without)
                ranks = _ranks(values, geometry) if variant == "centred" else dict.fromkeys(_RANKS, math.nan)
                found.append({**dict(zip(_WHERE, where, strict=True)), **_figures(geometry), **ranks})
    return pd.DataFrame(found)


def _figures(geometry: RowGeometry) -> dict[str, float]:
    sigma, s = geometry.singular_values, geometry.spectrum
    listed = {f"sigma_{k + 1}": float(sigma[k]) if k < len(sigma) else math.nan for k in range(N_LISTED)}
    shared = {"shift_share": geometry.shift_share, "cos_top_mean": geometry.cos_top_mean}
    of_spectrum = {name: value for name, value in s._asdict().items() if name not in ("n_rows", "d_model")}
    return {"n": s.n_rows, "d_model": s.d_model} | of_spectrum | listed | shared


def _ranks(rows: Float[Tensor, "row d_model"], centred: RowGeometry) -> dict[str, float]:
    """What noise would give: :data:`_RANKS`; NaN where rows are all alike or not finite."""
    sigma, size = centred.singular_values, {"n_rows": len(rows) - 1, "d_model": rows.shape[1]}
    if not (sigma.isfinite().all() and sigma.any()):
        return dict.fromkeys(_RANKS, math.nan)
    edge = math.sqrt(size["n_rows"] * tracy_widom_edge(**size, noise_variance=noise_variance(sigma, **size)))
    return dict(zip(_RANKS, (edge, signal_rank_correlated(rows), signal_rank_white(sigma, **size)), strict=True))


def long_spectra(spectra: pd.DataFrame) -> pd.DataFrame:
    """The same as ``spectra.csv`` has it, a row a figure: site, position, matrix, variant, metric, value, n, d_model, snapshot."""
    long = spectra.melt([*_WHERE, *_SIZE], var_name="metric", value_name="value")
    return long[["site", "position", "matrix", "variant", "metric", "value", *_SIZE, "snapshot"]]


def spectra_of(spectra: pd.DataFrame, matrix: str, variant: Variant) -> pd.DataFrame:
    """The rows of one matrix and variant, a row a site."""
    kept = (spectra["matrix"] == matrix) & (spectra["variant"] == variant)
    return spectra[kept].reset_index(drop=True)


def plot_update(axes: Axes, spectra: pd.DataFrame, metric: str) -> list[EndLabel]:
    """A figure of ΔH over the sites, a line a variant; returns their labels."""
    labels = []
    for variant, (style, colour, name) in LOOKS.items():
        found = spectra_of(spectra, "update", variant)
        plot_sites(axes, found["site"].tolist(), found[metric], style=style, colour=colour)
        labels.append(EndLabel(last_value(found[metric]), name, colour))
    return labels


def plot_states(axes: Axes, spectra: pd.DataFrame, metric: str) -> list[EndLabel]:
    """A figure of the states themselves, the policy's over the base's broad line, for each variant; returns their labels."""
    labels = []
    for variant, (style, _, name) in LOOKS.items():
        base, policy = (spectra_of(spectra, matrix, variant) for matrix in ("base", "policy"))
        sites = policy["site"].tolist()
        plot_sites(axes, sites, base[metric], colour=COLOURS["base"], is_behind=True)
        plot_sites(axes, sites, policy[metric], style=style)
        labels.append(EndLabel(last_value(policy[metric]), name, COLOURS["policy"]))
    return labels


def largest_change(spectra: pd.DataFrame, metric: str, form: str, *, unit: str = "") -> str:
    """The largest difference of policy and base under any variant, with where it is."""
    found = []
    for variant, (_, _, name) in LOOKS.items():
        base, policy = (spectra_of(spectra, matrix, variant) for matrix in ("base", "policy"))
        change = (policy[metric] - base[metric]).dropna()
        if len(change):
            at = int(change.abs().idxmax())
            found.append((float(change[at]), f"{name}, {site_name(policy['site'][at])}"))
    if not found:
        return "not known"
    most, where = max(found, key=lambda item: abs(item[0]))
    return f"{as_text(most, form)}{unit and f' {unit}'} ({where})"
