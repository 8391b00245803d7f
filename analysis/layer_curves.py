"""Is the update one constant shift, layer by layer? Shares, cosines and the table, at the last observation."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from analysis.figures import COLOURS, EndLabel
from analysis.observations import UPDATE, GeometryRow, after_steps, deepest, latest, site_name, updates
from analysis.report import Headline, Section
from analysis.site_axes import (
    Curve,
    Panel,
    as_text,
    draw_over_sites,
    extremes,
    finish_sites,
    last_value,
    plot_curves,
    prepare_sites,
    shade_sites,
)

NULLS = {
    "shift_share_null_high": "shift_share/null_high",
    "mean_cosine_in_sample_null_high": "mean_cosine/in_sample_null_high",
    "mean_cosine_leave_one_out_null_high": "mean_cosine/leave_one_out_null_high",
}
"""Upper ends of null bands: column of the table → name in metrics.csv, before the site."""
SHOWN = {
    "shift_share": ("f", "{:.3f}"),
    "top1_energy": ("ρ₁ raw", "{:.3f}"),
    "top1_energy_centred": ("ρ₁ centred", "{:.3f}"),
    "entropy_energy": ("H raw", "{:.2f}"),
    "entropy_energy_centred": ("H centred", "{:.2f}"),
    "mean_cosine_in_sample": ("cos in-sample", "{:.3f}"),
    "mean_cosine_leave_one_out": ("cos leave-one-out", "{:.3f}"),
}
"""Columns of the table as people read them: heading and format."""
_BLUE, _NAVY, _GREY = COLOURS["policy"], COLOURS["policy_dark"], COLOURS["mark"]


def geometry_section(table: pd.DataFrame) -> Section | None:
    """The section ``geometry``: shares and cosines by layer, with the table of both and of entropies.

    Args:
        table: :func:`analysis.observations.observed`.
    """
    last = geometry_table(table)
    panels: list[Panel] = []
    if last["shift_share"].notna().any():
        panels.append(draw_shares)
    if last["mean_cosine_leave_one_out"].notna().any():
        panels.append(draw_cosines)
    if not panels:
        return None
    figure, sentences = draw_over_sites(panels, last, panel_height_cm=6.0)
    return Section(
        name="geometry",
        question="Is what training did to hidden states one constant shift?",
        claim="D-STEER: DPO moves all hidden states along one shared direction, whatever the prompt.",
        sentences=sentences,
        interval="None here; grey is the null of sign flips where it was logged. Section clouds has the 95 % interval of f over "
        "prompts, section consistency that of the cosine.",
        limits=[
            "Whether the shift is preference: SFT or shuffled labels may shift as much, which is for control runs to say.",
            "Whether a few dimensions of large activations pass for a shift; sections entropy_controls and singular_values leave "
            "them out.",
            "More than one fact: ρ₁ ≥ f always, and with rows of equal length f is the square of the mean cosine. Centred ρ₁ is "
            "another.",
        ],
        figure=figure,
        table=last,
        shown=shown_table([GeometryRow(*row) for row in last[list(GeometryRow._fields)].itertuples(index=False)]),
        reading=_reading(last),
        headlines=_headlines(last),
    )


def geometry_table(table: pd.DataFrame) -> pd.DataFrame:
    """The last observation: a row for each site, in the order of the forward pass; empty columns where nothing was logged."""
    last = latest(updates(table))
    names = UPDATE | NULLS
    wanted = last.reindex(columns=["steps_taken", "position", "site", *names.values()])
    return wanted.set_axis(["steps_taken", "position", "site", *names], axis=1)


def shown_table(rows: Sequence[GeometryRow]) -> pd.DataFrame:
    """The table as text, for the page and the terminal; – where nothing was logged."""
    shown = {"site": [row.site for row in rows]}
    for column, (heading, form) in SHOWN.items():
        values = [getattr(row, column) for row in rows]
        shown[heading] = ["–" if x != x else form.format(x).replace("-", "−") for x in values]
    return pd.DataFrame(shown)


def draw_shares(axes: Axes, last: pd.DataFrame) -> str:
    """f, and ρ₁ raw and centred, with the null band of f."""
    sites = last["site"].tolist()
    prepare_sites(axes, sites)
    labels = []
    if last["shift_share_null_high"].notna().any():
        shade_sites(axes, sites, 0.0, last["shift_share_null_high"])
        labels.append(EndLabel(last_value(last["shift_share_null_high"]) / 2, "null of f", _GREY))
    curves = [
        Curve("top1_energy", "ρ₁", ":", _BLUE),
        Curve("top1_energy_centred", "ρ₁ centred", "--", _BLUE),
        Curve("shift_share", "f", "-", _NAVY),
    ]
    labels += plot_curves(axes, last, curves)
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("share of ΔH’s energy")
    finish_sites(axes, sites, labels, room=0.27)
    sentence = f"One constant shift is {extremes(sites, last['shift_share'], 'percent')} of the update"
    centred = last["top1_energy_centred"].max()
    return (
        sentence
        if centred != centred
        else f"{sentence}; without it, one direction holds at most {as_text(centred, 'percent')}"
    )


def draw_cosines(axes: Axes, last: pd.DataFrame) -> str:
    """Mean cosine with v*, in-sample and leave-one-out, with their null bands."""
    sites = last["site"].tolist()
    prepare_sites(axes, sites)
    labels = []
    for side in ("in_sample", "leave_one_out"):
        high = last[f"mean_cosine_{side}_null_high"]
        if high.notna().any():
            shade_sites(axes, sites, 0.0, high)
    if last["mean_cosine_in_sample_null_high"].notna().any():
        labels.append(EndLabel(last_value(last["mean_cosine_in_sample_null_high"]) / 2, "nulls", _GREY))
    curves = [
        Curve("mean_cosine_in_sample", "in-sample", ":", _BLUE),
        Curve("mean_cosine_leave_one_out", "leave-one-out", "-", _NAVY),
    ]
    labels += plot_curves(axes, last, curves)
    axes.set_ylim(min(0.0, float(last["mean_cosine_leave_one_out"].min()) - 0.03), 1.03)
    axes.set_ylabel("mean cosine with v*")
    finish_sites(axes, sites, labels, room=0.33)
    left_out = last["mean_cosine_leave_one_out"]
    n_above = int((left_out > last["mean_cosine_leave_one_out_null_high"]).sum())
    n_known = int((left_out.notna() & last["mean_cosine_leave_one_out_null_high"].notna()).sum())
    sentence = f"Leave-one-out, the mean cosine with v* is {extremes(sites, left_out, '.3f')}"
    return f"{sentence}, above its null at {n_above} of {n_known} sites" if n_known else sentence


def _reading(last: pd.DataFrame) -> list[str]:
    """How to read the figure, and what it does not show."""
    position, steps = last["position"].iloc[0], last["steps_taken"].iloc[0]
    lines = [
        f"ΔH holds the change of each probe pair’s hidden state at {position}, policy less base, {after_steps(steps)}; v* is its "
        "mean row. Diamond: the final norm’s output, on a scale of its own.",
        "f = N‖v*‖²/‖ΔH‖²: share of ΔH that is one constant row. ρ₁: share along its first direction; centred: of what is left "
        "without the mean row.",
        "In-sample, a row is part of its own mean, so noise alone gives about 1/√N; leave-one-out compares it with the others "
        "and has null 0.",
    ]
    if last["shift_share_null_high"].notna().any() or last["mean_cosine_leave_one_out_null_high"].notna().any():
        lines.append("Grey: up to the 97.5 % quantile when each row’s sign is flipped at random.")
    return lines


def _headlines(last: pd.DataFrame) -> list[Headline]:
    site = deepest(last["site"].tolist())
    row = last[last["site"] == site].iloc[0]
    found = []
    for column, name, form in (
        ("shift_share", "of the update is one constant shift (f)", "percent"),
        ("mean_cosine_leave_one_out", "mean cosine with v*, leave-one-out", ".3f"),
    ):
        if row[column] == row[column]:
            where = (
                f"{site_name(site)}, {after_steps(row['steps_taken'])}; geometry.csv, column {column}. No control yet."
            )
            found.append(Headline(as_text(float(row[column]), form), name, where))
    return found
