"""Does the entropy's collapse survive the controls? Fig. 4a for ΔH and for the states themselves, from stored rows."""

import math

import pandas as pd
from matplotlib.axes import Axes

from analysis.figures import COLOURS, EndLabel, mark_level
from analysis.report import Section
from analysis.site_axes import Panel, as_text, draw_over_sites, extremes, finish_sites, prepare_sites
from analysis.stored_rows import StoredRows
from analysis.stored_spectra import (
    LOOKS,
    VARIANTS_NOTE,
    largest_change,
    long_spectra,
    plot_states,
    plot_update,
    spectra_of,
)

_METRIC = "entropy_energy"
_DRAWN = ("entropy_energy", "entropy_singular", "normalized_entropy_energy", "normalized_entropy_singular")


def entropy_control_section(rows: StoredRows, spectra: pd.DataFrame) -> Section | None:
    """The section ``entropy_controls``; None where nothing changed.

    Args:
        spectra: :func:`analysis.stored_spectra.spectra_table` of the rows.
    """
    if spectra_of(spectra, "update", "raw")[_METRIC].isna().all():
        return None
    panels: list[Panel] = [draw_update, draw_states]
    figure, sentences = draw_over_sites(panels, spectra, panel_height_cm=6.4)
    long = long_spectra(spectra)
    return Section(
        name="entropy_controls",
        question="Does the entropy’s collapse survive the controls?",
        claim="D-STEER, Fig. 4a: spectral entropy collapses in the upper layers, from about layer 22 of 32 on.",
        sentences=sentences,
        interval="None: a resample repeats rows, and repeated rows lower any entropy. Its cap ln min(N, d) is drawn instead.",
        limits=[
            "Whether the collapse is preference optimisation’s: SFT and shuffled labels may do the same.",
            "Anything beside f and ρ₁ in the raw curve, which a constant shift alone makes small; centred, the shift is gone.",
        ],
        figure=figure,
        table=long[long["metric"].isin(_DRAWN)].reset_index(drop=True),
        reading=[
            f"ΔH: change of each pair’s hidden state at {rows.position}, base to {rows.snapshot}; {_size(spectra)}.",
            "Energy entropy H = −Σ q ln q, q = σ²/Σσ², in nats. 0: one direction; exp H: as many equal directions. "
            "The table has that of singular values too, and both over their cap.",
            VARIANTS_NOTE,
            "Second panel: thin blue, the policy’s states; broad grey beneath, the base’s.",
            *rows.notes(),
        ],
        headlines=[],
    )


def draw_update(axes: Axes, spectra: pd.DataFrame) -> str:
    """Energy entropies of ΔH under every control, and their cap."""
    raw = spectra_of(spectra, "update", "raw")
    sites = raw["site"].tolist()
    prepare_sites(axes, sites)
    labels = plot_update(axes, spectra, _METRIC)
    cap = math.log(min(raw["n"].iloc[0], raw["d_model"].iloc[0]))
    mark_level(axes, cap)
    axes.set_ylim(0, 1.08 * cap)
    axes.set_ylabel("entropy of ΔH (nats)")
    finish_sites(axes, sites, [*labels, EndLabel(cap, "most possible", COLOURS["mark"])], room=0.32)
    others = [f"{LOOKS[v][2]} {_range(spectra_of(spectra, 'update', v)[_METRIC])}" for v in LOOKS if v != "raw"]
    return (
        f"ΔH’s entropy is {extremes(sites, raw[_METRIC], '.2f')} of at most {cap:.2f} nats (N = {raw['n'].iloc[0]}); "
        + ", ".join(others)
    )


def draw_states(axes: Axes, spectra: pd.DataFrame) -> str:
    """Energy entropies of the states themselves."""
    sites = spectra_of(spectra, "policy", "raw")["site"].tolist()
    prepare_sites(axes, sites)
    labels = plot_states(axes, spectra, _METRIC)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set_ylabel("entropy of the states (nats)\npolicy: thin, base: broad")
    finish_sites(axes, sites, labels, room=0.32)
    return f"The states’ own entropy changes most by {largest_change(spectra, _METRIC, '+.2f', unit='nats')}"


def _range(values: pd.Series) -> str:
    low, high = (as_text(float(x), ".2f") for x in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _size(spectra: pd.DataFrame) -> str:
    return f"N = {spectra['n'].iloc[0]} rows of width {spectra['d_model'].iloc[0]}, which cap every entropy"
