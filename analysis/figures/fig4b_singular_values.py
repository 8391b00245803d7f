"""Is the update of rank one? Fig. 4b: singular values under every control, and how many directions are more than noise (C14)."""

import math
from functools import partial

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from analysis.controls.c08_random_weights import MISSING, NOTE, draw_random, is_known, with_random
from analysis.figures.fig4a_entropy import (
    LISTED,
    LOOKS,
    VARIANTS_NOTE,
    largest_change,
    long_spectra,
    plot_states,
    plot_update,
    spectra,
    spectra_of,
    wide_spectra,
)
from analysis.open.observations import site_name
from analysis.open.observed import Observed, Tables, about, row_notes
from analysis.report.page import Section
from analysis.report.site_axes import (
    SITES_LABEL,
    Curve,
    Panel,
    as_text,
    draw_over_sites,
    draw_panels,
    extremes,
    finish_sites,
    last_value,
    plot_curves,
    plot_sites,
    prepare_sites,
    span,
)
from analysis.report.style import COLOURS, EndLabel, label_ends, mark_level, use_log_scale
from tiltmeter.geometry.rows import in_own_span, row_geometry
from tiltmeter.geometry.spectra import leading_energies_of_gram
from tiltmeter.stats.jackknife import SHARE, Interval, jackknife_intervals
from tiltmeter.stats.nulls import (
    noise_variance,
    parallel_analysis,
    tracy_widom_edge,
)

CLAIM = 0.1
"""The paper says that σ₂/σ₁ is below."""
N_DRAWN = 20
"""Components of the scree plot."""
N_PERMUTATIONS = 19
_DRAWN = (*LISTED, "sigma_ratio", "cos_top_mean", "shift_share")
_MATRICES = {
    "update": ("ΔH", COLOURS["policy_dark"]),
    "base": ("base", COLOURS["base"]),
    "policy": ("policy", COLOURS["policy"]),
}
_GREY = COLOURS["mark"]


def singular_value_tables(seen: Observed) -> Tables | None:
    """``singular_values``: what is drawn; ``spectra``: every figure; ``singular_values_about``: random weights, intervals."""
    rows, wide = seen.at(), seen.once(spectra)
    if rows is None or wide is None or spectra_of(wide, "update", "raw")["sigma_ratio"].isna().all():
        return None
    raw, centred = (spectra_of(wide, "update", variant) for variant in ("raw", "centred"))
    figures = raw[["sigma_ratio", "cos_top_mean"]].assign(sigma_ratio_centred=centred["sigma_ratio"])
    said = with_random(about(rows).join(figures), seen.random, rows.points[0].position, list(figures))
    point = next(point for point in reversed(rows.points) if rows.update(point).any())
    update = in_own_span(rows.update(point))
    energy, ratio = jackknife_intervals(
        leading_energies_of_gram(update @ update.T), rows.clusters_of(point), scale=SHARE
    )
    for name, interval in (("top1_energy", energy), ("sigma_ratio_at", Interval(*map(math.sqrt, ratio)))):
        for end, value in zip(("", "_low", "_high"), interval, strict=True):
            said.loc[said["site"] == point.site, f"{name}{end}"] = value
    long = long_spectra(wide)
    drawn = long[long["metric"].isin(_DRAWN)].reset_index(drop=True)
    return {"singular_values": drawn, "spectra": long, "singular_values_about": said}


def draw_singular_values(tables: Tables) -> Section:
    """The section of what :func:`singular_value_tables` made."""
    wide, said = wide_spectra(tables["singular_values"]), tables["singular_values_about"]
    panels: list[Panel] = [partial(panel, said=said) for panel in (draw_listed, draw_ratios, draw_alignment)]
    figure, sentences = draw_over_sites([*panels, draw_states], wide, panel_height_cm=5.2)
    return Section(
        name="singular_values",
        question="Is the update of rank one?",
        claim="D-STEER, Fig. 4b: in every layer σ₂/σ₁ is below .1 and the first direction is the steering vector, u₁ ≈ v*.",
        sentences=sentences,
        interval=_interval(said),
        limits=[
            "Independent evidence: with f the share of one constant shift, σ₁² holds at least f of ΔH, and f > ½ makes "
            "|cos(u₁, v*)| at least √f (grey). A small σ₂/σ₁ and u₁ ≈ v* repeat f; centred, the ratio is news.",
            "What the directions do, and whether SFT or shuffled labels leave more of them.",
        ],
        figure=figure,
        table=tables["singular_values"],
        reading=_reading(wide, said),
        more_tables={name: tables[name] for name in ("spectra", "singular_values_about")},
    )


def _interval(said: pd.DataFrame) -> str:
    """ρ₁ and σ₂/σ₁ at the last site that changed."""
    here = said.dropna(subset="top1_energy").iloc[0]
    first, second = (
        f"{as_text(here[name], '.2f')}, 95 % CI {as_text(here[f'{name}_low'], '.2f')} … {as_text(here[f'{name}_high'], '.2f')}"
        for name in ("top1_energy", "sigma_ratio_at")
    )
    return (
        f"At {site_name(here['site'])}: ρ₁ {first}; σ₂/σ₁ {second}; prompts left out one at a time. They are of {here['n_rows']} "
        "rows: with fewer both are larger, and of noise alone the interval of ρ₁ does not reach down to one over the dimensions. "
        "Section signal_rank has what noise would give."
    )


def draw_listed(axes: Axes, wide: pd.DataFrame, *, said: pd.DataFrame) -> str:
    """σ₂ … σ₅ over σ₁ of the raw update."""
    raw = spectra_of(wide, "update", "raw")
    sites = raw["site"].tolist()
    prepare_sites(axes, sites)
    mark_level(axes, CLAIM)
    ratios = raw[["site"]].join(raw[[*LISTED[1:]]].div(raw["sigma_1"], axis=0))
    curves = [
        Curve(name, f"σ{digit}", style, COLOURS["policy_dark" if digit == "₂" else "policy"])
        for name, digit, style in zip(LISTED[1:], "₂₃₄₅", ("-", "--", "-.", ":"), strict=True)
    ]
    labels = [EndLabel(CLAIM, "paper", _GREY), *draw_random(axes, said, "sigma_ratio", name="σ₂, random")]
    labels += plot_curves(axes, ratios, curves)
    axes.set_ylim(0, max(0.15, axes.get_ylim()[1]))
    axes.set_ylabel("σ / σ₁, raw")
    finish_sites(axes, sites, labels, room=0.3)
    words = f"The second singular value is {extremes(sites, raw['sigma_ratio'], '.2f')} of the first"
    if not is_known(said, "sigma_ratio"):
        return words
    return f"{words}; under random weights of equal norm {span(said['sigma_ratio_random'], '.2f')}"


def draw_ratios(axes: Axes, wide: pd.DataFrame, *, said: pd.DataFrame) -> str:
    """σ₂/σ₁ of ΔH under each control."""
    raw, centred = (spectra_of(wide, "update", variant)["sigma_ratio"] for variant in ("raw", "centred"))
    sites = said["site"].tolist()
    prepare_sites(axes, sites)
    mark_level(axes, CLAIM)
    labels = [EndLabel(CLAIM, "paper", _GREY)]
    labels += draw_random(axes, said, "sigma_ratio_centred", name="random, centred")
    labels += plot_update(axes, wide, "sigma_ratio")
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("σ₂ / σ₁ of ΔH")
    finish_sites(axes, sites, labels, room=0.3)
    n_raw, n_centred = (int((found < CLAIM).sum()) for found in (raw, centred))
    words = (
        f"σ₂/σ₁ is below {CLAIM} at {n_raw} of {len(sites)} sites, and at {n_centred} once the mean row is taken out: "
        f"then {extremes(sites, centred, '.2f')}"
    )
    there = said["sigma_ratio_centred_random"]
    return words if there.isna().all() else f"{words}, and under random weights {span(there, '.2f')}"


def draw_alignment(axes: Axes, wide: pd.DataFrame, *, said: pd.DataFrame) -> str:
    """|cos(u₁, v*)|, of the variants that keep their mean."""
    raw = spectra_of(wide, "update", "raw")
    sites = raw["site"].tolist()
    prepare_sites(axes, sites)
    labels = draw_random(axes, said, "cos_top_mean")
    for variant in (name for name in LOOKS if name != "centred"):
        style, colour, name = LOOKS[variant]
        values = spectra_of(wide, "update", variant)["cos_top_mean"]
        plot_sites(axes, sites, values, style=style, colour=colour)
        labels.append(EndLabel(last_value(values), name, colour))
    root = raw["shift_share"].where(raw["shift_share"] > 0.5) ** 0.5
    plot_sites(axes, sites, root, style=(0, (1, 2)), colour=_GREY)
    labels.append(EndLabel(last_value(root), "√f", _GREY))
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("|cos(u₁, v*)|")
    finish_sites(axes, sites, labels, room=0.3)
    words = f"The cosine of the first direction and v* is {extremes(sites, raw['cos_top_mean'], '.3f')}"
    there = said["cos_top_mean_random"]
    return words if there.isna().all() else f"{words}; under random weights {span(there, '.3f')}"


def draw_states(axes: Axes, wide: pd.DataFrame) -> str:
    """σ₂/σ₁ of the states themselves."""
    sites = spectra_of(wide, "policy", "raw")["site"].tolist()
    prepare_sites(axes, sites)
    labels = plot_states(axes, wide, "sigma_ratio")
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("σ₂ / σ₁ of the states\npolicy: thin, base: broad")
    finish_sites(axes, sites, labels, room=0.3)
    return f"The states’ own σ₂/σ₁ changes most by {largest_change(wide, 'sigma_ratio', '+.2f')}"


def _reading(wide: pd.DataFrame, said: pd.DataFrame) -> list[str]:
    here, size = said.iloc[0], f"N = {wide['n'].iloc[0]} rows of width {wide['d_model'].iloc[0]}"
    return [
        f"ΔH: change of each pair’s hidden state at {here['position']}, base to {here['snapshot']}; {size}. σ₁ ≥ σ₂ … its singular "
        f"values, u₁ its first direction, v* its mean row. Dashed grey: {CLAIM}, below which the paper finds σ₂/σ₁.",
        VARIANTS_NOTE,
        NOTE if said["sigma_ratio_random"].notna().any() else f"Here {MISSING}.",
        "spectra.csv has every figure of ΔH, of the base’s and of the policy’s states, a row each: entropies, ranks, σ₁ … σ₅, f, "
        "the Marchenko–Pastur edge and how many singular values lie above it.",
        *row_notes(said),
    ]


def signal_rank_tables(seen: Observed) -> Tables | None:
    """``signal_rank``: the scree at the deepest site; ``signal_rank_about``: directions beyond noise, a row a site."""
    rows, wide = seen.at(), seen.once(spectra)
    if rows is None or wide is None or not rows.update(rows.points[-1]).any():
        return None
    point, said = rows.points[-1], about(rows)
    for matrix in _MATRICES:
        said[f"signal_rank_{matrix}"] = spectra_of(wide, matrix, "centred")["signal_rank"]
    said["signal_rank_white"] = spectra_of(wide, "update", "centred")["signal_rank_white"]
    table, edge, n_above = scree(rows.update(point))
    said.loc[said["site"] == point.site, "n_above_null"] = n_above
    return {"signal_rank": table.assign(site=point.site, edge=edge), "signal_rank_about": said}


def scree(update: Float[Tensor, "row d_model"]) -> tuple[pd.DataFrame, float, int]:
    """The first singular values over σ₁ of the raw update, and what noise would give in their place.

    Returns:
        component, raw, centred, null (parallel analysis, of the centred rows); the edge that the largest of white noise is above
        in one of twenty sets; and how many leading centred values are above their null: the first that isn't ends the count.
    """
    raw = row_geometry(update).singular_values
    centred = row_geometry(update, "centred").singular_values
    null = parallel_analysis(update, n_permutations=N_PERMUTATIONS)
    n = min(N_DRAWN, len(raw))
    size = {"n_rows": len(update) - 1, "d_model": update.shape[1]}
    edge = math.sqrt(size["n_rows"] * tracy_widom_edge(**size, noise_variance=noise_variance(centred, **size)))
    above = (centred > null).tolist()
    table = {name: (x[:n] / raw[0]).numpy() for name, x in (("raw", raw), ("centred", centred), ("null", null))}
    found = pd.DataFrame({"component": range(1, n + 1)} | table)
    return found, edge / float(raw[0]), above.index(False) if False in above else len(above)


def draw_signal_ranks(tables: Tables) -> Section:
    """The section of what :func:`signal_rank_tables` made."""
    table, said = tables["signal_rank"], tables["signal_rank_about"]
    panels: list[Panel] = [lambda axes, _: draw_ranks(axes, said), partial(draw_scree, here=said.iloc[-1])]
    figure, sentences = draw_panels(panels, table, panel_height_cm=6.0)
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
        table=table,
        reading=_rank_reading(said),
        more_tables={"signal_rank_about": said},
    )


def draw_ranks(axes: Axes, said: pd.DataFrame) -> str:
    """Signal rank of the centred rows of each matrix, against noise whose dimensions may be correlated."""
    labels, sites = [], said["site"].tolist()
    prepare_sites(axes, sites)
    for matrix, (name, colour) in _MATRICES.items():
        plot_sites(axes, sites, said[f"signal_rank_{matrix}"], colour=colour)
        labels.append(EndLabel(last_value(said[f"signal_rank_{matrix}"]), name, colour))
    axes.set_ylim(0, 1.08 * max(1.0, axes.get_ylim()[1]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_ylabel("directions beyond noise")
    axes.set_xlabel(SITES_LABEL)
    finish_sites(axes, sites, labels)
    return (
        f"Of {said['n_rows'].iloc[0]} rows’ ΔH, centred, {extremes(sites, said['signal_rank_update'], '.0f')} directions stand "
        f"apart from noise with correlated dimensions; against white noise it would be "
        f"{extremes(sites, said['signal_rank_white'], '.0f')}"
    )


def draw_scree(axes: Axes, table: pd.DataFrame, here: pd.Series) -> str:
    """The first singular values at the deepest site, raw and centred, over parallel analysis and the edge."""
    at, edge, blue, navy = table["component"], float(table["edge"].iloc[0]), COLOURS["policy"], COLOURS["policy_dark"]
    axes.set_xlim(0.4, len(table) + 0.6)
    use_log_scale(axes)
    axes.fill_between(at, table["null"].clip(lower=1e-6), 1e-6, color=COLOURS["null"], alpha=0.45, linewidth=0)
    raw, centred = (table[name].where(table[name] > 0) for name in ("raw", "centred"))
    axes.plot(at, raw, color=navy, marker="o", markersize=2.5)
    axes.plot(at, centred, color=blue, linestyle="--", marker="o", markersize=2.5)
    shown = np.concatenate([table["raw"], table["centred"], table["null"], [edge]])
    axes.set_ylim(max(float(shown[shown > 0].min()) / 2, 1e-4), 1.6)
    labels = [
        EndLabel(last_value(raw), "raw", navy),
        EndLabel(last_value(centred), "centred", blue),
        EndLabel(float(table["null"].iloc[-1]), "permuted", _GREY),
    ]
    if edge == edge:
        mark_level(axes, edge)
        labels.append(EndLabel(edge, "edge", _GREY))
    axes.set_ylabel("σ / σ₁ of the raw update")
    axes.set_xlabel("component")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    label_ends(axes, [label for label in labels if label.y > 0], room=0.26)
    n, (rank, white) = int(here["n_above_null"]), (here[f"signal_rank_{name}"] for name in ("update", "white"))
    held = {0: "no direction holds", 1: "1 direction holds"}.get(n, f"{n} directions hold")
    return (
        f"At {site_name(here['site'])}, after centring, {as_count(rank)} stand apart from correlated noise; "
        f"{held} more than independent dimensions would, {as_count(white)} more than white noise"
    )


def as_count(rank: float) -> str:
    """A number of directions; none where all rows are alike, of which there is no rank."""
    return f"{rank:.0f}" if rank == rank else "0"


def _rank_reading(said: pd.DataFrame) -> list[str]:
    here = said.iloc[0]
    return [
        f"ΔH: change of each pair’s hidden state at {here['position']}, base to {here['snapshot']}, {here['n_rows']} rows; base, "
        "policy: the states themselves. All less their mean row, but for the line “raw”.",
        "First panel: a gap below the leading values that noise of any covariance, also with heavy tails, leaves in one of twenty "
        "sets (after Onatski 2009; at most 10). White noise: one after the other above the Tracy–Widom quantile (Kritchman and "
        "Nadler 2008), dashed in the second panel. Real error rates: docs/statistics.md. spectra.csv (section singular_values) has "
        "both.",
        f"Second panel, grey, “permuted”: the largest of {N_PERMUTATIONS} times that each dimension is permuted on its own "
        "(parallel analysis), which keeps unequal dimensions unequal.",
        *row_notes(said),
    ]
