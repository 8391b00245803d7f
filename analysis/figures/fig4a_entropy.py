"""Over how many directions do the update and the states spread? Fig. 4a: spectral entropies by layer, and under every control."""

import math
from collections.abc import Mapping
from functools import partial

import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from analysis.controls.c08_random_weights import MISSING, NOTE, draw_random, is_known, with_random
from analysis.open.observations import latest, most_entropy, site_name, updates
from analysis.open.observed import Observed, Tables, about, row_notes
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
from tiltmeter.geometry.rows import OUTLIER_MULTIPLE, VARIANTS, RowGeometry, Variant, outlier_dims, row_geometry
from tiltmeter.metric_names import WEIGHTS, metric
from tiltmeter.metric_names import matrix as matrix_name
from tiltmeter.states.state_pair import StatePair
from tiltmeter.stats.nulls import noise_variance, signal_rank_correlated, signal_rank_white, tracy_widom_edge

ENTROPIES = {
    f"{matrix_name(of, variant)}_{weights}": metric("spectral_entropy", matrix_name(of, variant), weights)
    for of in ("delta", "base", "policy")
    for variant in ("raw", "centred")
    for weights in WEIGHTS
}
"""Column of the table → name in metrics.csv, without the site."""
_RANDOM = ("entropy_energy", "entropy_energy_centred", "entropy_singular", "entropy_singular_centred")
"""Entropies that are told under random weights, too."""
_BLUE, _NAVY, _GREY = COLOURS["policy"], COLOURS["policy_dark"], COLOURS["mark"]
_METRIC = "entropy_energy"
_DRAWN = ("entropy_energy", "entropy_singular", "normalized_entropy_energy", "normalized_entropy_singular")
_NO_INTERVAL = (
    "None: a resample repeats rows, and repeated rows lower any entropy. Its cap ln min(N, d) is drawn instead."
)
LISTED = tuple(f"sigma_{k}" for k in range(1, 6))
"""Told one by one, as in the paper's Fig. 4b."""
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
_WHERE = ("snapshot", "position", "site", "matrix", "variant")
_SIZE = ("n", "d_model")
_RANKS = ("tracy_widom_edge", "signal_rank", "signal_rank_white")


def entropy_tables(seen: Observed) -> Tables | None:
    """``entropy``: as last observed, in nats, and how much the states' own changed, a row a site; ``entropy_about``: their cap."""
    last = latest(updates(seen.table)).reindex(columns=["steps_taken", "position", "site", *ENTROPIES.values()])
    last = last.set_axis(["steps_taken", "position", "site", *ENTROPIES], axis=1)
    if last["delta_energy"].isna().all():
        return None
    for of in ("energy", "centred_energy"):
        last[f"change_{of}"] = last[f"policy_{of}"] - last[f"base_{of}"]
    table = with_random(last, seen.random, str(last["position"].iloc[0]), _RANDOM)
    return {"entropy": table, "entropy_about": pd.DataFrame({"most_possible": [most_entropy(seen.table)]})}


def draw_entropies(tables: Tables) -> Section:
    """The section of what :func:`entropy_tables` made."""
    last, cap = tables["entropy"], float(tables["entropy_about"]["most_possible"].iloc[0])
    panels: list[Panel] = [partial(draw_update, cap=cap)]
    panels += [draw_change] if last["change_energy"].notna().any() else []
    figure, sentences = draw_over_sites(panels, last, panel_height_cm=6.0)
    return Section(
        name="entropy",
        question="Does the spread over directions collapse?",
        claim="D-STEER, Fig. 4a: spectral entropy collapses in the upper layers, from about layer 22 of 32 on.",
        sentences=sentences,
        interval=_NO_INTERVAL,
        limits=[
            "Which entropy the paper drew: it does not say, so energies and singular values, update and states stand here.",
            "Anything beside f and ρ₁ in the raw curves: a constant shift alone makes them small. Centred, it says how the rest "
            "spreads. Section entropy_controls has every control.",
            "What SFT or shuffled labels do to the same entropies.",
        ],
        figure=figure,
        table=last,
        reading=_reading(last, cap),
        more_tables={"entropy_about": tables["entropy_about"]},
    )


def draw_update(axes: Axes, last: pd.DataFrame, *, cap: float) -> str:
    """Entropies of ΔH: of energies and of singular values, raw and centred."""
    sites = last["site"].tolist()
    prepare_sites(axes, sites)
    curves = [
        Curve("delta_energy", "raw", "-", _NAVY),
        Curve("delta_centred_energy", "centred", "--", _BLUE),
        Curve("delta_singular", "raw, of σ", ":", _NAVY),
        Curve("delta_centred_singular", "centred, of σ", "-.", _BLUE),
    ]
    labels = draw_random(axes, last, "entropy_energy")
    labels += draw_random(axes, last, "entropy_energy_centred", name="random, centred", style="--")
    labels += plot_curves(axes, last, curves)
    if math.isfinite(cap):
        mark_level(axes, cap)
        labels.append(EndLabel(cap, "most possible", _GREY))
    axes.set_ylim(0, axes.get_ylim()[1])
    axes.set_ylabel("entropy of ΔH (nats)")
    finish_sites(axes, sites, labels, room=0.33)
    most = f"of at most {cap:.2f} nats" if math.isfinite(cap) else "nats"
    sentence = f"The update’s energy entropy is {extremes(sites, last['delta_energy'], '.2f')} {most}"
    centred = last["delta_centred_energy"].dropna()
    sentence += "" if centred.empty else f"; once centred, {span(centred, '.2f')}"
    if last["entropy_energy_random"].isna().all():
        return sentence
    raw, rest = (span(last[f"entropy_energy{variant}_random"], ".2f") for variant in ("", "_centred"))
    return f"{sentence}. Under random weights of equal norm {raw}; centred, {rest}"


def draw_change(axes: Axes, last: pd.DataFrame) -> str:
    """Draw the change of the entropy of the states themselves."""
    sites = last["site"].tolist()
    prepare_sites(axes, sites)
    mark_level(axes, 0.0)
    curves = [
        Curve("change_energy", "raw", "-", _NAVY),
        Curve("change_centred_energy", "centred", "--", _BLUE),
    ]
    labels = [EndLabel(0.0, "no change", _GREY), *plot_curves(axes, last, curves)]
    reach = max(0.05, 1.15 * float(last[["change_energy", "change_centred_energy"]].abs().max().max()))
    axes.set_ylim(-reach, reach)
    axes.set_ylabel("H(policy) − H(base) (nats)")
    finish_sites(axes, sites, labels, room=0.27)
    sentence = f"The states’ own entropy changes by {extremes(sites, last['change_energy'], '+.2f', unit='nats')}"
    centred = last["change_centred_energy"].dropna()
    return sentence if centred.empty else f"{sentence}; centred, {span(centred, '+.2f')}"


def _reading(last: pd.DataFrame, cap: float) -> list[str]:
    lines = [
        "H = −Σ q ln q over a matrix’s singular values σ. Energy entropy: q = σ²/Σσ²; “of σ”: q = σ/Σσ, which weighs small "
        "directions more. 0: one direction; exp H: as many equal directions.",
        "The second panel is about the states themselves, not their change: whether the policy’s states use fewer directions than "
        "the base’s.",
        "Centred: less the mean row. Diamond: the final norm’s output.",
        NOTE if last["entropy_energy_random"].notna().any() else f"Here {MISSING}.",
    ]
    if math.isfinite(cap):
        n = round(math.exp(cap))
        lines.insert(
            1, f"Read it beside N: no entropy can pass ln min(N, d) = ln {n} = {cap:.2f} nats, N pairs of width d."
        )
    return lines


def entropy_control_tables(seen: Observed) -> Tables | None:
    """``entropy_controls``: entropies under every control; ``entropy_controls_about``: ΔH's beside random weights, a row a site."""
    rows, wide = seen.at(), seen.once(spectra)
    if rows is None or wide is None or (raw := spectra_of(wide, "update", "raw"))[_METRIC].isna().all():
        return None
    said = with_random(about(rows).join(raw[_METRIC]), seen.random, rows.points[0].position, [_METRIC])
    long = long_spectra(wide)
    drawn = long[long["metric"].isin(_DRAWN)].reset_index(drop=True)
    return {"entropy_controls": drawn, "entropy_controls_about": said}


def draw_entropy_controls(tables: Tables) -> Section:
    """The section of what :func:`entropy_control_tables` made."""
    wide, said = wide_spectra(tables["entropy_controls"]), tables["entropy_controls_about"]
    here, (n, d) = said.iloc[0], spectra_of(wide, "update", "raw")[["n", "d_model"]].iloc[0]
    figure, sentences = draw_over_sites([partial(draw_variants, said=said), draw_states], wide, panel_height_cm=6.4)
    return Section(
        name="entropy_controls",
        question="Does the entropy’s collapse survive the controls?",
        claim="D-STEER, Fig. 4a: spectral entropy collapses in the upper layers, from about layer 22 of 32 on.",
        sentences=sentences,
        interval=_NO_INTERVAL,
        limits=[
            "Whether the collapse is preference optimisation’s: SFT and shuffled labels may do the same.",
            "Anything beside f and ρ₁ in the raw curve, which a constant shift alone makes small; centred, the shift is gone.",
        ],
        figure=figure,
        table=tables["entropy_controls"],
        reading=[
            f"ΔH: change of each pair’s hidden state at {here['position']}, base to {here['snapshot']}; N = {n} rows of width {d}, "
            "which cap every entropy.",
            "Energy entropy H = −Σ q ln q, q = σ²/Σσ², in nats. 0: one direction; exp H: as many equal directions. "
            "The table has that of singular values too, and both over their cap.",
            VARIANTS_NOTE,
            NOTE if said[f"{_METRIC}_random"].notna().any() else f"Here {MISSING}.",
            "Second panel: thin blue, the policy’s states; broad grey beneath, the base’s.",
            *row_notes(said),
        ],
        more_tables={"entropy_controls_about": said},
    )


def draw_variants(axes: Axes, wide: pd.DataFrame, *, said: pd.DataFrame) -> str:
    """Energy entropies of ΔH under every control, under random weights, and their cap."""
    raw, sites = spectra_of(wide, "update", "raw"), said["site"].tolist()
    prepare_sites(axes, sites)
    labels = [*draw_random(axes, said, _METRIC), *plot_update(axes, wide, _METRIC)]
    cap = math.log(min(raw["n"].iloc[0], raw["d_model"].iloc[0]))
    mark_level(axes, cap)
    axes.set_ylim(0, 1.08 * cap)
    axes.set_ylabel("entropy of ΔH (nats)")
    finish_sites(axes, sites, [*labels, EndLabel(cap, "most possible", _GREY)], room=0.32)
    others = [f"{LOOKS[v][2]} {span(spectra_of(wide, 'update', v)[_METRIC], '.2f')}" for v in LOOKS if v != "raw"]
    if is_known(said, _METRIC):
        others.append(f"random weights {span(said[f'{_METRIC}_random'], '.2f')}")
    return (
        f"ΔH’s entropy is {extremes(sites, raw[_METRIC], '.2f')} of at most {cap:.2f} nats (N = {raw['n'].iloc[0]}); "
        + ", ".join(others)
    )


def draw_states(axes: Axes, wide: pd.DataFrame) -> str:
    """Energy entropies of the states themselves."""
    sites = spectra_of(wide, "policy", "raw")["site"].tolist()
    prepare_sites(axes, sites)
    labels = plot_states(axes, wide, _METRIC)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set_ylabel("entropy of the states (nats)\npolicy: thin, base: broad")
    finish_sites(axes, sites, labels, room=0.32)
    return f"The states’ own entropy changes most by {largest_change(wide, _METRIC, '+.2f', unit='nats')}"


def spectra(rows: StatePair) -> pd.DataFrame:
    """Spectra of {update, base, policy} × {raw, centred, unit rows, outliers removed}: a row for each site, matrix and variant.

    A column for each figure, and N and d. Singular values in activation units, entropies in nats, ``tracy_widom_edge`` as a
    singular value. ``signal_rank`` allows for correlated dimensions and heavy tails, ``signal_rank_white`` for neither; both of
    centred rows, NaN of others.
    """
    found = []
    for point in rows.points:
        base, policy = rows.rows(point)
        without, told = outlier_dims(base)
        for matrix, values in {"update": rows.update(point), "base": base, "policy": policy}.items():
            for variant in VARIANTS:
                where = (rows.name, point.position, point.site, matrix, variant)
                kept = values[told] if variant == "outlier_dims_removed" else values
                geometry = row_geometry(kept, variant, without=without)
                ranks = _ranks(values, geometry) if variant == "centred" else dict.fromkeys(_RANKS, math.nan)
                found.append({**dict(zip(_WHERE, where, strict=True)), **_figures(geometry), **ranks})
    return pd.DataFrame(found)


def _figures(geometry: RowGeometry) -> dict[str, float]:
    sigma, s = geometry.singular_values, geometry.spectrum
    listed = {name: float(sigma[k]) if k < len(sigma) else math.nan for k, name in enumerate(LISTED)}
    shared = {"shift_share": geometry.shift_share, "cos_top_mean": geometry.cos_top_mean}
    of_spectrum = {name: value for name, value in s._asdict().items() if name not in ("n_rows", "d_model")}
    return {"n": s.n_rows, "d_model": s.d_model} | of_spectrum | listed | shared


def _ranks(rows: Float[Tensor, "row d_model"], centred: RowGeometry) -> dict[str, float]:
    """Ranks that noise would give: :data:`_RANKS`; NaN where rows are all alike or not finite."""
    sigma, size = centred.singular_values, {"n_rows": len(rows) - 1, "d_model": rows.shape[1]}
    if not (sigma.isfinite().all() and sigma.any()):
        return dict.fromkeys(_RANKS, math.nan)
    edge = math.sqrt(size["n_rows"] * tracy_widom_edge(**size, noise_variance=noise_variance(sigma, **size)))
    return dict(zip(_RANKS, (edge, signal_rank_correlated(rows), signal_rank_white(sigma, **size)), strict=True))


def long_spectra(wide: pd.DataFrame) -> pd.DataFrame:
    """Spectra with a row a figure: site, position, matrix, variant, metric, value, n, d_model, snapshot."""
    long = wide.melt([*_WHERE, *_SIZE], var_name="metric", value_name="value")
    return long[["site", "position", "matrix", "variant", "metric", "value", *_SIZE, "snapshot"]]


def wide_spectra(long: pd.DataFrame) -> pd.DataFrame:
    """The inverse of :func:`long_spectra`, for the figures that it holds."""
    figures = long.set_index([*_WHERE, *_SIZE, "metric"])["value"]
    return figures.unstack("metric", sort=False).reset_index()


def spectra_of(wide: pd.DataFrame, matrix: str, variant: Variant) -> pd.DataFrame:
    """The rows of one matrix and variant, a row a site."""
    return wide[(wide["matrix"] == matrix) & (wide["variant"] == variant)].reset_index(drop=True)


def plot_update(axes: Axes, wide: pd.DataFrame, metric: str) -> list[EndLabel]:
    """A figure of ΔH over the sites, a line a variant; returns their labels."""
    labels = []
    for variant, (style, colour, name) in LOOKS.items():
        found = spectra_of(wide, "update", variant)
        plot_sites(axes, found["site"].tolist(), found[metric], style=style, colour=colour)
        labels.append(EndLabel(last_value(found[metric]), name, colour))
    return labels


def plot_states(axes: Axes, wide: pd.DataFrame, metric: str) -> list[EndLabel]:
    """A figure of the states themselves, the policy's over the base's broad line, for each variant; returns their labels."""
    labels = []
    for variant, (style, _, name) in LOOKS.items():
        base, policy = (spectra_of(wide, matrix, variant) for matrix in ("base", "policy"))
        sites = policy["site"].tolist()
        plot_sites(axes, sites, base[metric], colour=COLOURS["base"], is_behind=True)
        plot_sites(axes, sites, policy[metric], style=style)
        labels.append(EndLabel(last_value(policy[metric]), name, COLOURS["policy"]))
    return labels


def largest_change(wide: pd.DataFrame, metric: str, form: str, *, unit: str = "") -> str:
    """The largest difference of policy and base under any variant, with where it is."""
    found = []
    for variant, (_, _, name) in LOOKS.items():
        base, policy = (spectra_of(wide, matrix, variant) for matrix in ("base", "policy"))
        change = (policy[metric] - base[metric]).dropna()
        if len(change):
            at = int(change.abs().idxmax())
            found.append((float(change[at]), f"{name}, {site_name(policy['site'][at])}"))
    if not found:
        return "not known"
    most, where = max(found, key=lambda item: abs(item[0]))
    return f"{as_text(most, form)}{unit and f' {unit}'} ({where})"
