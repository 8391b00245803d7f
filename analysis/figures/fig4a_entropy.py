"""Over how many directions do the update and the states spread, layer by layer? Spectral entropies at the last observation."""

import math
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from analysis.controls.c08_random_weights import MISSING, NOTE, draw_random, with_random
from analysis.open.observations import latest, most_entropy, updates
from analysis.report.page import Section
from analysis.report.site_axes import (
    Curve,
    Panel,
    draw_over_sites,
    extremes,
    finish_sites,
    plot_curves,
    prepare_sites,
    span,
)
from analysis.report.style import COLOURS, EndLabel, mark_level
from tiltmeter.metric_names import WEIGHTS, matrix, metric
from tiltmeter.weights.random_update import RandomUpdates

ENTROPIES = {
    f"{matrix(of, variant)}_{weights}": metric("spectral_entropy", matrix(of, variant), weights)
    for of in ("delta", "base", "policy")
    for variant in ("raw", "centred")
    for weights in WEIGHTS
}
"""Column of the table → name in metrics.csv, without the site."""
_RANDOM = ("entropy_energy", "entropy_energy_centred", "entropy_singular", "entropy_singular_centred")
"""Those also told under random weights."""
_BLUE, _NAVY, _GREY = COLOURS["policy"], COLOURS["policy_dark"], COLOURS["mark"]


def entropy_section(table: pd.DataFrame, random: RandomUpdates | None = None) -> Section | None:
    """The section ``entropy``.

    Args:
        table: :func:`analysis.open.observations.observed`.
        random: the update's random counterparts; None: not read.
    """
    last, cap = entropy_table(table), most_entropy(table)
    last = with_random(last, random, str(last["position"].iloc[0]) if len(last) else "", _RANDOM)
    if last["delta_energy"].isna().all():
        return None
    panels: list[Panel] = [partial(draw_update, cap=cap)]
    panels += [draw_states] if last["change_energy"].notna().any() else []
    figure, sentences = draw_over_sites(panels, last, panel_height_cm=6.0)
    return Section(
        name="entropy",
        question="Does the spread over directions collapse?",
        claim="D-STEER, Fig. 4a: spectral entropy collapses in the upper layers, from about layer 22 of 32 on.",
        sentences=sentences,
        interval="None: a resample repeats rows, and repeated rows lower any entropy. Its cap ln min(N, d) is drawn instead.",
        limits=[
            "Which entropy the paper drew: it does not say, so energies and singular values, update and states stand here.",
            "Anything beside f and ρ₁ in the raw curves: a constant shift alone makes them small. Centred, it says how the rest "
            "spreads. Section entropy_controls has every control.",
            "What SFT or shuffled labels do to the same entropies.",
        ],
        figure=figure,
        table=last,
        reading=_reading(last, cap),
        headlines=[],
    )


def entropy_table(table: pd.DataFrame) -> pd.DataFrame:
    """The last observation: entropies in nats at every site, and how much the states' own changed, policy − base."""
    last = latest(updates(table)).reindex(columns=["steps_taken", "position", "site", *ENTROPIES.values()])
    last = last.set_axis(["steps_taken", "position", "site", *ENTROPIES], axis=1)
    for of in ("energy", "centred_energy"):
        last[f"change_{of}"] = last[f"policy_{of}"] - last[f"base_{of}"]
    return last


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


def draw_states(axes: Axes, last: pd.DataFrame) -> str:
    """How much the entropy of the states themselves changed."""
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
