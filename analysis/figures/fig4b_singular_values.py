"""Is the update of rank one, layer by layer? The first singular values of ΔH, and what is left of them under the controls."""

import math
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from analysis.controls.c08_random_weights import MISSING, NOTE, draw_random, is_known, with_random
from analysis.figures.stored_spectra import (
    LOOKS,
    N_LISTED,
    VARIANTS_NOTE,
    largest_change,
    long_spectra,
    plot_states,
    plot_update,
    spectra_of,
)
from analysis.open.observations import site_name
from analysis.open.stored_rows import StoredRows
from analysis.report.page import Section
from analysis.report.site_axes import (
    Curve,
    Panel,
    as_text,
    draw_over_sites,
    extremes,
    finish_sites,
    last_value,
    plot_curves,
    plot_sites,
    prepare_sites,
    span,
)
from analysis.report.style import COLOURS, EndLabel, mark_level
from tiltmeter.geometry.rows import in_own_span
from tiltmeter.geometry.spectra import leading_energies_of_gram
from tiltmeter.stats.jackknife import SHARE, Interval, jackknife_intervals
from tiltmeter.weights.random_update import RandomUpdates

CLAIM = 0.1
"""The paper says that σ₂/σ₁ is below."""
_GREY = COLOURS["mark"]
_DRAWN = (*(f"sigma_{k + 1}" for k in range(N_LISTED)), "sigma_ratio", "cos_top_mean", "shift_share")


def singular_value_section(
    rows: StoredRows, spectra: pd.DataFrame, random: RandomUpdates | None = None
) -> Section | None:
    """The section ``singular_values``, with the table ``spectra``; None where nothing changed.

    Args:
        spectra: :func:`analysis.figures.stored_spectra.spectra_table` of the rows.
        random: the update's random counterparts; None: not read.
    """
    if spectra_of(spectra, "update", "raw")["sigma_ratio"].isna().all():
        return None
    panels: list[Panel] = [partial(panel, random=random) for panel in (draw_listed, draw_ratios, draw_alignment)]
    panels.append(draw_states)
    figure, sentences = draw_over_sites(panels, spectra, panel_height_cm=5.2)
    long = long_spectra(spectra)
    return Section(
        name="singular_values",
        question="Is the update of rank one?",
        claim="D-STEER, Fig. 4b: in every layer σ₂/σ₁ is below .1 and the first direction is the steering vector, u₁ ≈ v*.",
        sentences=sentences,
        interval=_interval(rows),
        limits=[
            "Independent evidence: with f the share of one constant shift, σ₁² holds at least f of ΔH, and f > ½ makes "
            "|cos(u₁, v*)| at least √f (grey). A small σ₂/σ₁ and u₁ ≈ v* repeat f; centred, the ratio is news.",
            "What the directions do, and whether SFT or shuffled labels leave more of them.",
        ],
        figure=figure,
        table=long[long["metric"].isin(_DRAWN)].reset_index(drop=True),
        reading=_reading(rows, spectra, random),
        headlines=[],
        more_tables={"spectra": long},
    )


def _interval(rows: StoredRows) -> str:
    """ρ₁ and σ₂/σ₁ at the last site that changed."""
    site = next(site for site in reversed(rows.sites) if rows.update(site).any())
    update = in_own_span(rows.update(site))
    energy, ratio = jackknife_intervals(leading_energies_of_gram(update @ update.T), rows.clusters, scale=SHARE)
    first, second = (
        f"{as_text(x.value, '.2f')}, 95 % CI {as_text(x.low, '.2f')} … {as_text(x.high, '.2f')}"
        for x in (energy, Interval(*map(math.sqrt, ratio)))
    )
    return (
        f"At {site_name(site)}: ρ₁ {first}; σ₂/σ₁ {second}; prompts left out one at a time. They are of {rows.n_rows} rows: with "
        "fewer both are larger, and of noise alone the interval of ρ₁ does not reach down to one over the dimensions. Section "
        "signal_rank has what noise would give."
    )


def draw_listed(axes: Axes, spectra: pd.DataFrame, *, random: RandomUpdates | None) -> str:
    """σ₂ … σ₅ over σ₁ of the raw update."""
    raw = with_random(spectra_of(spectra, "update", "raw"), random, str(spectra["position"].iloc[0]), ["sigma_ratio"])
    sites = raw["site"].tolist()
    prepare_sites(axes, sites)
    mark_level(axes, CLAIM)
    listed = [f"sigma_{k + 1}" for k in range(1, N_LISTED)]
    ratios = raw[["site"]].join(raw[listed].div(raw["sigma_1"], axis=0))
    curves = [
        Curve(name, f"σ{digit}", style, COLOURS["policy_dark" if digit == "₂" else "policy"])
        for name, digit, style in zip(listed, "₂₃₄₅", ("-", "--", "-.", ":"), strict=True)
    ]
    labels = [EndLabel(CLAIM, "paper", _GREY), *draw_random(axes, raw, "sigma_ratio", name="σ₂, random")]
    labels += plot_curves(axes, ratios, curves)
    axes.set_ylim(0, max(0.15, axes.get_ylim()[1]))
    axes.set_ylabel("σ / σ₁, raw")
    finish_sites(axes, sites, labels, room=0.3)
    said = f"The second singular value is {extremes(sites, raw['sigma_ratio'], '.2f')} of the first"
    if not is_known(raw, "sigma_ratio"):
        return said
    return f"{said}; under random weights of equal norm {span(raw['sigma_ratio_random'], '.2f')}"


def draw_ratios(axes: Axes, spectra: pd.DataFrame, *, random: RandomUpdates | None) -> str:
    """σ₂/σ₁ of ΔH under each control."""
    position = str(spectra["position"].iloc[0])
    raw, centred = (spectra_of(spectra, "update", variant) for variant in ("raw", "centred"))
    beside = with_random(centred[["site"]], random, position, ["sigma_ratio_centred"])
    sites = raw["site"].tolist()
    prepare_sites(axes, sites)
    mark_level(axes, CLAIM)
    labels = [
        EndLabel(CLAIM, "paper", _GREY),
        *draw_random(axes, beside, "sigma_ratio_centred", name="random, centred"),
    ]
    labels += plot_update(axes, spectra, "sigma_ratio")
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("σ₂ / σ₁ of ΔH")
    finish_sites(axes, sites, labels, room=0.3)
    n_raw, n_centred = (int((found["sigma_ratio"] < CLAIM).sum()) for found in (raw, centred))
    said = (
        f"σ₂/σ₁ is below {CLAIM} at {n_raw} of {len(sites)} sites, and at {n_centred} once the mean row is taken out: "
        f"then {extremes(sites, centred['sigma_ratio'], '.2f')}"
    )
    there = beside["sigma_ratio_centred_random"]
    return said if there.isna().all() else f"{said}, and under random weights {span(there, '.2f')}"


def draw_alignment(axes: Axes, spectra: pd.DataFrame, *, random: RandomUpdates | None) -> str:
    """|cos(u₁, v*)|, of the variants that keep their mean."""
    raw = with_random(spectra_of(spectra, "update", "raw"), random, str(spectra["position"].iloc[0]), ["cos_top_mean"])
    sites = raw["site"].tolist()
    prepare_sites(axes, sites)
    labels = draw_random(axes, raw, "cos_top_mean")
    for variant in (name for name in LOOKS if name != "centred"):
        style, colour, name = LOOKS[variant]
        values = spectra_of(spectra, "update", variant)["cos_top_mean"]
        plot_sites(axes, sites, values, style=style, colour=colour)
        labels.append(EndLabel(last_value(values), name, colour))
    root = raw["shift_share"].where(raw["shift_share"] > 0.5) ** 0.5
    plot_sites(axes, sites, root, style=(0, (1, 2)), colour=_GREY)
    labels.append(EndLabel(last_value(root), "√f", _GREY))
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("|cos(u₁, v*)|")
    finish_sites(axes, sites, labels, room=0.3)
    said = f"The cosine of the first direction and v* is {extremes(sites, raw['cos_top_mean'], '.3f')}"
    there = raw["cos_top_mean_random"]
    return said if there.isna().all() else f"{said}; under random weights {span(there, '.3f')}"


def draw_states(axes: Axes, spectra: pd.DataFrame) -> str:
    """σ₂/σ₁ of the states themselves."""
    sites = spectra_of(spectra, "policy", "raw")["site"].tolist()
    prepare_sites(axes, sites)
    labels = plot_states(axes, spectra, "sigma_ratio")
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("σ₂ / σ₁ of the states\npolicy: thin, base: broad")
    finish_sites(axes, sites, labels, room=0.3)
    return f"The states’ own σ₂/σ₁ changes most by {largest_change(spectra, 'sigma_ratio', '+.2f')}"


def _reading(rows: StoredRows, spectra: pd.DataFrame, random: RandomUpdates | None) -> list[str]:
    size = f"N = {spectra['n'].iloc[0]} rows of width {spectra['d_model'].iloc[0]}"
    return [
        f"ΔH: change of each pair’s hidden state at {rows.position}, base to {rows.snapshot}; {size}. σ₁ ≥ σ₂ … its singular "
        f"values, u₁ its first direction, v* its mean row. Dashed grey: {CLAIM}, below which the paper finds σ₂/σ₁.",
        VARIANTS_NOTE,
        f"Here {MISSING}." if random is None else NOTE,
        "spectra.csv has every figure of ΔH, of the base’s and of the policy’s states, a row each: entropies, ranks, σ₁ … σ₅, f, "
        "the Marchenko–Pastur edge and how many singular values lie above it.",
        *rows.notes(),
    ]
