"""Does the entropy's collapse survive the controls? Fig. 4a for ΔH and for the states themselves, from stored rows."""

import math
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from analysis.controls.c08_random_weights import MISSING, NOTE, draw_random, is_known, with_random
from analysis.figures.stored_spectra import (
    LOOKS,
    VARIANTS_NOTE,
    largest_change,
    long_spectra,
    plot_states,
    plot_update,
    spectra_of,
)
from analysis.open.stored_rows import StoredRows
from analysis.report.page import Section
from analysis.report.site_axes import Panel, draw_over_sites, extremes, finish_sites, prepare_sites, span
from analysis.report.style import COLOURS, EndLabel, mark_level
from tiltmeter.weights.random_update import RandomUpdates

_METRIC = "entropy_energy"
_DRAWN = ("entropy_energy", "entropy_singular", "normalized_entropy_energy", "normalized_entropy_singular")


def entropy_control_section(
    rows: StoredRows, spectra: pd.DataFrame, random: RandomUpdates | None = None
) -> Section | None:
    """The section ``entropy_controls``; None where nothing changed.

    Args:
        spectra: :func:`analysis.figures.stored_spectra.spectra_table` of the rows.
        random: the update's random counterparts; None: not read.
    """
    if spectra_of(spectra, "update", "raw")[_METRIC].isna().all():
        return None
    panels: list[Panel] = [partial(draw_update, random=random), draw_states]
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
            f"Here {MISSING}." if random is None else NOTE,
            "Second panel: thin blue, the policy’s states; broad grey beneath, the base’s.",
            *rows.notes(),
        ],
        headlines=[],
    )


def draw_update(axes: Axes, spectra: pd.DataFrame, *, random: RandomUpdates | None) -> str:
    """Energy entropies of ΔH under every control, under random weights, and their cap."""
    raw = with_random(spectra_of(spectra, "update", "raw"), random, str(spectra["position"].iloc[0]), [_METRIC])
    sites = raw["site"].tolist()
    prepare_sites(axes, sites)
    labels = [*draw_random(axes, raw, _METRIC), *plot_update(axes, spectra, _METRIC)]
    cap = math.log(min(raw["n"].iloc[0], raw["d_model"].iloc[0]))
    mark_level(axes, cap)
    axes.set_ylim(0, 1.08 * cap)
    axes.set_ylabel("entropy of ΔH (nats)")
    finish_sites(axes, sites, [*labels, EndLabel(cap, "most possible", COLOURS["mark"])], room=0.32)
    others = [f"{LOOKS[v][2]} {span(spectra_of(spectra, 'update', v)[_METRIC], '.2f')}" for v in LOOKS if v != "raw"]
    if is_known(raw, _METRIC):
        others.append(f"random weights {span(raw[f'{_METRIC}_random'], '.2f')}")
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


def _size(spectra: pd.DataFrame) -> str:
    return f"N = {spectra['n'].iloc[0]} rows of width {spectra['d_model'].iloc[0]}, which cap every entropy"
