"""Do the updates of all pairs point the same way? Fig. 3: cosines with v*, pair by pair and by site, beside their nulls."""

import math
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from analysis.controls.c08_random_weights import MISSING, NOTE, draw_random, with_random
from analysis.open.observations import site_name
from analysis.open.observed import Observed, Tables, about, row_notes
from analysis.report.page import Section
from analysis.report.site_axes import (
    Curve,
    Panel,
    as_text,
    draw_over_sites,
    draw_panels,
    extremes,
    finish_sites,
    plot_curves,
    prepare_sites,
    shade_sites,
    span,
)
from analysis.report.style import COLOURS, EndLabel
from tiltmeter.geometry.consistency import in_sample_cosines, leave_one_out_cosines, mean_cosine_intervals, split_half
from tiltmeter.geometry.rows import in_own_span, row_geometry
from tiltmeter.states.capture import ReadPoint
from tiltmeter.states.state_pair import StatePair
from tiltmeter.stats.nulls import sign_flip_null, split_half_null

EDGES = np.linspace(-1.0, 1.0, 81)
"""Bins of every cosine histogram, 0.025 wide."""
N_SPLITS = 20
"""Random halves; a pair's split-half cosine is counted in each."""
N_FLIPS = 500
"""Sign flips behind each null band, the central 95 %."""
N_POOLED_FLIPS = 50
"""Sign flips pooled for the null of single pairs."""
OF_PAIRS = {"in_sample": "In-sample", "leave_one_out": "Leave-one-out", "split_half": "Split-half"}
"""Means over pairs of the cosine with v*, with v* of the others, with v* of the half that a pair is not in."""
MEASURES = (*OF_PAIRS, "between_halves")
"""The last one: cosine of the two halves' v*."""
_MEANS = [f"mean_cosine_{name}" for name in OF_PAIRS]
_BLUE, _NAVY, _GREY = COLOURS["policy"], COLOURS["policy_dark"], COLOURS["mark"]
_TAILS = torch.tensor([0.025, 0.975], dtype=torch.float64)


def cosine_tables(seen: Observed) -> Tables | None:
    """``cosines``: histograms at the deepest site, a row a bin; ``cosines_about``: means, intervals and nulls there, one row."""
    if (rows := seen.at()) is None:
        return None
    point = rows.points[-1]
    means = pd.DataFrame([consistency_row(rows, point)])
    if means["split_half"].isna().all():
        return None
    update = rows.update(point)
    update = update[update.any(1)]
    generator = torch.Generator().manual_seed(0)
    flipped: dict[str, list[Tensor]] = {side: [] for side in OF_PAIRS}
    for _ in range(N_POOLED_FLIPS):
        signs = 2.0 * torch.randint(0, 2, (len(update), 1), generator=generator, dtype=torch.float64) - 1
        for side, values in _cosines(signs * update).items():
            flipped[side].append(values)
    table = pd.DataFrame({"cosine_low": EDGES[:-1].round(6), "cosine_high": EDGES[1:].round(6)})
    for side, values in _cosines(update).items():
        null = _counts(torch.cat(flipped[side]))
        table[f"{side}_pairs"] = _counts(values) * len(update) / values.numel()
        table[f"{side}_null_share"] = null / max(null.sum(), 1)
    means = with_random(means, seen.random, point.position, _MEANS)
    return {"cosines": table, "cosines_about": means.assign(dtype=rows.dtype, n_left_out=rows.n_left_out)}


def consistency_tables(seen: Observed) -> Tables | None:
    """``consistency``: each of :data:`MEASURES` with interval, null and random weights, a row a site; ``consistency_about``."""
    if (rows := seen.at()) is None:
        return None
    table = pd.DataFrame([consistency_row(rows, point) for point in rows.points])
    if table["split_half"].isna().all():
        return None
    table = with_random(table, seen.random, rows.points[0].position, _MEANS)
    return {"consistency": table, "consistency_about": about(rows)}


def consistency_row(rows: StatePair, point: ReadPoint) -> dict[str, object]:
    """One site: each of :data:`MEASURES`, its null's central 95 % and, where it is a mean over pairs, its interval."""
    where = {"snapshot": rows.name, "position": point.position, "site": point.site, "n_rows": rows.n_rows}
    update = in_own_span(rows.update(point))
    moved = update.any(1)
    clusters = [name for name, kept in zip(rows.clusters_of(point), moved.tolist(), strict=True) if kept]
    figures = _figures(update[moved], clusters) if len(clusters) > 1 else dict.fromkeys(MEASURES, math.nan)
    return where | {"n_unmoved": rows.n_rows - len(clusters)} | figures


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
        figures |= intervals[name].named(name) | _band(name, null)
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
    return dict(zip((f"{name}_null_low", f"{name}_null_high"), null.nanquantile(_TAILS).tolist(), strict=True))


def _cosines(update: Tensor) -> dict[str, Tensor]:
    """[split or 1, row] by side."""
    found = {"in_sample": in_sample_cosines(update)[None], "leave_one_out": leave_one_out_cosines(update)[None]}
    return found | {"split_half": split_half(update, n_splits=N_SPLITS).cosines}


def _counts(cosines: Tensor) -> np.ndarray:
    known = cosines[~cosines.isnan()].clamp(-1, 1).numpy()
    return np.histogram(known, EDGES)[0]


def draw_cosines(tables: Tables) -> Section:
    """The section of what :func:`cosine_tables` made."""
    table, means = tables["cosines"], tables["cosines_about"].iloc[0]
    panels = [partial(draw_histogram, side=side, means=means) for side in OF_PAIRS]
    figure, sentences = draw_panels(panels, table, panel_height_cm=4.6, x_label="cos(δᵢ, v*)")
    value, low, high = (as_text(means[f"split_half{end}"], ".3f") for end in ("", "_low", "_high"))
    return Section(
        name="cosines",
        question="Do the updates of all pairs point the same way?",
        claim="D-STEER, Fig. 3: every prompt’s update has a cosine of .92 to .96 with the mean update v*.",
        sentences=sentences,
        interval=f"Mean split-half cosine {value}, 95 % CI {low} … {high} over prompts, v* taken anew. Its null, central 95 %: "
        f"{_null(means, 'split_half')}.",
        limits=[
            "How much of this is one constant shift that any training makes, or a few dimensions of large activations.",
            "Anything beside f and ρ₁: the mean cosine is the same fact told again.",
            "Other seeds, other data and other sites; section consistency has every site.",
        ],
        figure=figure,
        table=table,
        reading=_cosine_reading(tables["cosines_about"]),
        more_tables={"cosines_about": tables["cosines_about"]},
    )


def draw_histogram(axes: Axes, table: pd.DataFrame, side: str, means: pd.Series) -> str:
    """One histogram over its null, with the mean under random weights; returns its message."""
    counts, null = table[f"{side}_pairs"].to_numpy(), table[f"{side}_null_share"].to_numpy()
    observed = counts / max(counts.sum(), 1)
    axes.stairs(null, EDGES, fill=True, color=COLOURS["null"], alpha=0.6, zorder=2)
    axes.stairs(observed, EDGES, fill=True, color=_BLUE, alpha=0.75, zorder=3)
    filled = np.flatnonzero(observed + null)
    low, high = EDGES[filled[0]], EDGES[filled[-1] + 1]
    random, lowest, highest = (float(means[f"mean_cosine_{side}_random{end}"]) for end in ("", "_low", "_high"))
    if random == random:
        axes.axvspan(lowest, highest, color=COLOURS["random_update"], alpha=0.35, linewidth=0, zorder=1)
        axes.axvline(random, color=COLOURS["random_update"], linewidth=1.0, zorder=4)
        low, high = min(low, lowest), max(high, highest)
    margin = 0.04 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(0, 1.22 * max(observed.max(), null.max()))
    axes.set_ylabel("share of pairs")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    clear = np.where(observed > 0, 0.0, null)  # the null's label stands where it is not hidden
    for shares, word, colour in (
        (clear if clear.any() else null, "signs flipped", _GREY),
        (observed, "observed", _BLUE),
    ):
        at = (EDGES[:-1] + EDGES[1:])[int(shares.argmax())] / 2
        side_of = "left" if at < (low + high) / 2 else "right"
        axes.text(at, shares.max(), word, color=colour, ha=side_of, va="bottom", zorder=4, weight="bold")
    told = "inside" if means[f"{side}_null_low"] <= means[side] <= means[f"{side}_null_high"] else "outside"
    mean = as_text(means[side], ".3f")
    said = f"{OF_PAIRS[side]}, the mean cosine with v* is {mean}, {told} its null {_null(means, side)}"
    if random != random:
        return said
    return f"{said}; under random weights (line) {as_text(random, '.3f')}, {as_text(lowest, '.2f')} … {as_text(highest, '.2f')}"


def _null(means: pd.Series, side: str) -> str:
    return " … ".join(as_text(means[f"{side}_null_{end}"], ".2f") for end in ("low", "high"))


def _cosine_reading(means: pd.DataFrame) -> list[str]:
    here = means.iloc[0]
    lines = [
        f"δᵢ: change of pair i’s hidden state at {site_name(here['site'])}, {here['position']}, from base to {here['snapshot']}; "
        f"v*: mean change. {here['n_rows']} pairs.",
        "In-sample, v* contains δᵢ itself, which alone gives cosines of about 1/√N. Leave-one-out: v* of the other pairs. "
        f"Split-half: v* of the random half that the pair is not in, {N_SPLITS} splits pooled.",
        f"Grey: the same rows with signs flipped at random, {N_POOLED_FLIPS} times; the null interval in the title is the central "
        f"95 % of the same mean over {N_FLIPS} flips.",
    ]
    if here["n_unmoved"]:
        lines.append(f"{here['n_unmoved']} pairs whose state did not change have no cosine.")
    return [*lines, *row_notes(means), _note(means)]


def draw_consistency(tables: Tables) -> Section:
    """The section of what :func:`consistency_tables` made."""
    table = tables["consistency"]
    panels: list[Panel] = [draw_halves, *(partial(draw_measure, measure=measure) for measure in reversed(OF_PAIRS))]
    figure, sentences = draw_over_sites(panels, table, panel_height_cm=4.6)
    last = table.dropna(subset="split_half").iloc[-1]
    value, low, high = (as_text(last[f"split_half{end}"], ".3f") for end in ("", "_low", "_high"))
    return Section(
        name="consistency",
        question="Is the common direction the same in both halves of the pairs?",
        claim="D-STEER, Fig. 3: all prompts’ updates have a cosine of .92 to .96 with one vector v*.",
        sentences=sentences,
        interval=f"Mean split-half cosine at {site_name(last['site'])}: {value}, 95 % CI {low} … {high} over prompts, v* taken "
        "anew.",
        limits=[
            "Other seeds, other prompts and other data, where v* may differ: the halves share the run and its probe.",
            "Anything beside f and N: where the dashed line is met, agreement of halves is f told again.",
        ],
        figure=figure,
        table=table,
        reading=_consistency_reading(table, tables["consistency_about"]),
        more_tables={"consistency_about": tables["consistency_about"]},
    )


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


def _consistency_reading(table: pd.DataFrame, said: pd.DataFrame) -> list[str]:
    here = table.iloc[0]
    lines = [
        f"δᵢ: change of pair i’s hidden state at {here['position']}, base to {here['snapshot']}; v*: mean change. "
        f"{here['n_rows']} rows.",
        f"Split-half: v* from one random half, δᵢ from the other, {N_SPLITS} splits; mean and least of them. Leave-one-out: v* of "
        "the other rows. In-sample, v* contains δᵢ, which alone gives about 1/√N.",
        f"Grey: central 95 % over {N_FLIPS} times in which each row’s sign was flipped at random. Blue band: 95 % interval over "
        "prompts, v* taken anew. Diamond: the final norm’s output.",
        "Two halves of many rows agree on v* even where single rows hardly follow it: their cosine grows with N. Dashed grey: what "
        "it is for a constant shift of share f plus noise; close to it, it is the same fact as f, and the mean cosines too.",
        "The null of the halves’ cosine is in the table only: flipped signs keep the line on which rows lie, so two halves of "
        "nearly parallel rows still agree up to the sign, and its interval reaches from −1 to 1.",
    ]
    if n_unmoved := int(table["n_unmoved"].max()):
        lines.append(f"Up to {n_unmoved} rows did not change and have no cosine.")
    return [*lines, *row_notes(said), _note(table)]


def _note(table: pd.DataFrame) -> str:
    return NOTE if table[f"{_MEANS[0]}_random"].notna().any() else f"Here {MISSING}."
