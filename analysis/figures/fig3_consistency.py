"""Is v* reproducible? In-sample, leave-one-out and split-half cosines at every site, from stored rows, beside their nulls."""

import math
from functools import partial

import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor

from analysis.controls.c08_random_weights import MISSING, NOTE, draw_random, with_random
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
    plot_curves,
    prepare_sites,
    shade_sites,
    span,
)
from analysis.report.style import COLOURS, EndLabel
from tiltmeter.geometry.consistency import mean_cosine_intervals, split_half
from tiltmeter.geometry.rows import in_own_span, row_geometry
from tiltmeter.stats.nulls import sign_flip_null, split_half_null
from tiltmeter.weights.random_update import RandomUpdates

N_SPLITS = 20
N_FLIPS = 500
"""Sign flips behind each null band, the central 95 %."""
OF_PAIRS = {"in_sample": "In-sample", "leave_one_out": "Leave-one-out", "split_half": "Split-half"}
"""Means over pairs of the cosine with v*, with v* of the others, with v* of the half that a pair is not in."""
MEASURES = (*OF_PAIRS, "between_halves")
"""The last one: cosine of the two halves' v*."""
_BLUE, _NAVY, _GREY = COLOURS["policy"], COLOURS["policy_dark"], COLOURS["mark"]


def consistency_section(rows: StoredRows, random: RandomUpdates | None = None) -> Section | None:
    """The section ``consistency``; None where nothing changed."""
    table = with_random(consistency_table(rows), random, rows.position, [f"mean_cosine_{name}" for name in OF_PAIRS])
    if table["split_half"].isna().all():
        return None
    panels: list[Panel] = [draw_halves, *(partial(draw_measure, measure=measure) for measure in reversed(OF_PAIRS))]
    figure, sentences = draw_over_sites(panels, table, panel_height_cm=4.6)
    return Section(
        name="consistency",
        question="Is the common direction the same in both halves of the pairs?",
        claim="D-STEER, Fig. 3: all prompts’ updates have a cosine of .92 to .96 with one vector v*.",
        sentences=sentences,
        interval=_interval(table),
        limits=[
            "Other seeds, other prompts and other data, where v* may differ: the halves share the run and its probe.",
            "Anything beside f and N: where the dashed line is met, agreement of halves is f told again.",
        ],
        figure=figure,
        table=table,
        reading=[*_reading(rows, table), f"Here {MISSING}." if random is None else NOTE],
        headlines=[],
    )


def consistency_table(rows: StoredRows) -> pd.DataFrame:
    """A row a site: each of :data:`MEASURES`, its null's central 95 % and, where it is a mean over pairs, its interval."""
    found = []
    for site in rows.sites:
        where = {"snapshot": rows.snapshot, "position": rows.position, "site": site, "n_rows": rows.n_rows}
        update = in_own_span(rows.update(site))
        moved = update.any(1)
        clusters = [name for name, kept in zip(rows.clusters, moved.tolist(), strict=True) if kept]
        figures = _figures(update[moved], clusters) if len(clusters) > 1 else dict.fromkeys(MEASURES, math.nan)
        found.append(where | {"n_unmoved": rows.n_rows - len(clusters)} | figures)
    return pd.DataFrame(found)


def _figures(update: Tensor, clusters: list[str]) -> dict[str, float]:
    halves = split_half(update, n_splits=N_SPLITS)
    flipped_halves = split_half_null(update, n_flips=N_FLIPS, n_splits=N_SPLITS)
    flipped = sign_flip_null(update, n_flips=N_FLIPS)
    share = row_geometry(update).shift_share
    figures: dict[str, float] = {
        "shift_share": share,
        "between_halves_expected": expected_between_halves(share, len(update)),
    }
    intervals = mean_cosine_intervals(update, clusters, n_splits=N_SPLITS)
    for name, null in (
        ("in_sample", flipped.mean_cosine_in_sample),
        ("leave_one_out", flipped.mean_cosine_leave_one_out),
        ("split_half", flipped_halves.mean_cosine),
    ):
        interval = intervals[name]
        figures |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
        figures |= _band(name, null)
    between = halves.cosine_of_means
    figures |= {"split_half_least": float(halves.mean_cosine.min())}
    figures |= {"between_halves": float(between.nanmean()), "between_halves_least": float(between.min())}
    return figures | _band("between_halves", flipped_halves.cosine_of_means)


def expected_between_halves(shift_share: float, n_rows: int) -> float:
    """cos of two halves' means if every row is one shift plus noise of its own: no news beside f and N.

    ‖v‖² / (‖v‖² + s²/n) with n = N/2, where f estimates (‖v‖² + s²/N) / (‖v‖² + s²). NaN where f is not above its null 1/N.

    >>> expected_between_halves(1.0, 10)
    1.0
    """
    signal = (n_rows * shift_share - 1) / (n_rows - 1)
    return signal / (signal + (1 - signal) * 2 / n_rows) if signal > 0 else math.nan


def _band(name: str, null: Tensor) -> dict[str, float]:
    ends = null.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return dict(zip((f"{name}_null_low", f"{name}_null_high"), ends, strict=True))


def draw_halves(axes: Axes, table: pd.DataFrame) -> str:
    """cos of the two halves' v*, mean and least over splits."""
    sites = table["site"].tolist()
    prepare_sites(axes, sites)
    curves = [
        Curve("between_halves_expected", "from f and N", "--", _GREY),
        Curve("between_halves_least", "least", ":", _BLUE),
        Curve("between_halves", "mean", "-", _NAVY),
    ]
    labels = plot_curves(axes, table, curves)
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.03)
    axes.set_ylabel("cos(v* of one half,\nof the other)")
    finish_sites(axes, sites, labels, room=0.3)
    said = f"v* of two random halves of the pairs has a cosine of {extremes(sites, table['between_halves'], '.3f')}"
    apart = float((table["between_halves"] - table["between_halves_expected"]).abs().max())
    return (
        said if apart != apart else f"{said}; f and N alone give the same to within {as_text(max(apart, 0.001), '.3f')}"
    )


def draw_measure(axes: Axes, table: pd.DataFrame, *, measure: str) -> str:
    """The mean cosine of single pairs, with its interval, over its own null."""
    sites = table["site"].tolist()
    prepare_sites(axes, sites)
    low, high = table[f"{measure}_null_low"], table[f"{measure}_null_high"]
    shade_sites(axes, sites, low, high)
    shade_sites(axes, sites, table[f"{measure}_low"], table[f"{measure}_high"], colour=_NAVY)
    word = OF_PAIRS[measure]
    labels = draw_random(axes, table, f"mean_cosine_{measure}", name="random weights")
    labels += plot_curves(axes, table, [Curve(measure, word.lower(), "-", _NAVY)])
    labels.append(EndLabel(float((low + high).iloc[-1]) / 2, "its null", _GREY))
    axes.set_ylim(min(-0.05, axes.get_ylim()[0]), 1.03)
    axes.set_ylabel("mean cosine of δᵢ")
    finish_sites(axes, sites, labels, room=0.38)
    n_above, n_known = int((table[measure] > high).sum()), int(table[measure].notna().sum())
    said = f"{word}, the mean cosine is {extremes(sites, table[measure], '.3f')}, above its null at {n_above} of {n_known} sites"
    there = table[f"mean_cosine_{measure}_random"]
    return said if there.isna().all() else f"{said}; under random weights of equal norm {span(there, '.3f')}"


def _interval(table: pd.DataFrame) -> str:
    last = table.dropna(subset="split_half").iloc[-1]
    value, low, high = (as_text(last[f"split_half{end}"], ".3f") for end in ("", "_low", "_high"))
    where = site_name(last["site"])
    return f"Mean split-half cosine at {where}: {value}, 95 % CI {low} … {high} over prompts, v* taken anew."


def _reading(rows: StoredRows, table: pd.DataFrame) -> list[str]:
    lines = [
        f"δᵢ: change of pair i’s hidden state at {rows.position}, base to {rows.snapshot}; v*: mean change. {rows.n_rows} rows.",
        f"Split-half: v* from one random half, δᵢ from the other, {N_SPLITS} splits; mean and least of them. Leave-one-out: v* of "
        "the other rows. In-sample, v* contains δᵢ, which alone gives about 1/√N.",
        f"Grey: central 95 % over {N_FLIPS} times in which each row’s sign was flipped at random. Blue band: 95 % interval over "
        "prompts, v* taken anew. Diamond: the final norm’s output.",
        "Two halves of many rows agree on v* even where single rows hardly follow it: their cosine grows with N. Dashed grey: what "
        "it is for a constant shift of share f plus noise; close to it, it is the same fact as f, and the mean cosines too.",
        "The null of the halves’ cosine is in the table only: flipped signs keep the line on which rows lie, so two halves of "
        "nearly parallel rows still agree up to the sign, and its interval reaches from −1 to 1.",
    ]
    n_unmoved = int(table["n_unmoved"].max())
    if n_unmoved:
        lines.append(f"Up to {n_unmoved} rows did not change and have no cosine.")
    return [*lines, *rows.notes()]
