"""Do the updates of all pairs point the same way? Cosines with v* pair by pair, from stored rows, beside their null."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from analysis.controls.c08_random_weights import MISSING, NOTE, with_random
from analysis.open.observations import site_name
from analysis.open.stored_rows import StoredRows
from analysis.report.page import Section
from analysis.report.site_axes import as_text
from analysis.report.style import COLOURS, house_style, new_figure, set_titles
from tiltmeter.geometry.consistency import in_sample_cosines, leave_one_out_cosines, mean_cosine_intervals, split_half
from tiltmeter.stats.jackknife import Interval
from tiltmeter.stats.nulls import sign_flip_null, split_half_null
from tiltmeter.weights.random_update import RandomUpdates

EDGES = np.linspace(-1.0, 1.0, 81)
"""Bins of every cosine histogram, 0.025 wide."""
SIDES = ("in_sample", "leave_one_out", "split_half")
"""v* of all pairs; of the others; of the half that the pair is not in."""
N_FLIPS = 50
"""Sign flips pooled for the null of single pairs."""
N_BAND_FLIPS = 500
"""Sign flips behind the null band of the mean."""
N_SPLITS = 20
"""Random halves; a pair's split-half cosine is counted in each."""
_TITLES = {"in_sample": "In-sample", "leave_one_out": "Leave-one-out", "split_half": "Split-half"}


class CosineSet(NamedTuple):
    """cos(δ_i, v*) of every pair at one site; histograms are shares of pairs in the bins of :data:`EDGES`."""

    snapshot: str
    site: str
    position: str
    dtype: str
    n_pairs: int
    shares: dict[str, np.ndarray]
    """By side, :data:`SIDES`."""
    counts: dict[str, np.ndarray]
    """Pairs in each bin; of split halves the mean over splits."""
    null_shares: dict[str, np.ndarray]
    """Of the same rows with signs flipped at random, pooled over flips."""
    means: dict[str, Interval]
    """With 95 % intervals over prompts, v* taken anew."""
    bands: dict[str, tuple[float, float]]
    """Central 95 % of the mean under sign flips."""


def deepest_cosines(rows: StoredRows) -> CosineSet | None:
    """The cosines at the deepest site; None where fewer than two pairs changed there."""
    site = rows.sites[-1]
    return cosine_set(rows, site) if int(rows.update(site).any(1).sum()) > 1 else None


def cosine_set(rows: StoredRows, site: str) -> CosineSet:
    """Histograms, means and nulls of the rows of an update; rows of zeros have no direction and are left out."""
    update = rows.update(site)
    moved = update.any(1)
    update, prompts = update[moved], [rows.clusters[i] for i in moved.nonzero()[:, 0].tolist()]
    found = _cosines(update)
    generator = torch.Generator().manual_seed(0)
    flipped: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    for _ in range(N_FLIPS):
        signs = 2.0 * torch.randint(0, 2, (len(update), 1), generator=generator, dtype=torch.float64) - 1
        for side, values in _cosines(signs * update).items():
            flipped[side].append(values)
    halves = split_half_null(update, n_flips=N_BAND_FLIPS, n_splits=N_SPLITS)
    bands = sign_flip_null(update, n_flips=N_BAND_FLIPS).band()
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = halves.mean_cosine.nanquantile(tails).tolist()
    counts = {side: _counts(values) * len(update) / values.numel() for side, values in found.items()}
    nulls = {side: _counts(torch.cat(values)) for side, values in flipped.items()}
    return CosineSet(
        rows.snapshot,
        site,
        rows.position,
        rows.dtype,
        rows.n_rows,
        {side: n / max(n.sum(), 1) for side, n in counts.items()},
        counts,
        {side: n / max(n.sum(), 1) for side, n in nulls.items()},
        mean_cosine_intervals(update, prompts, n_splits=N_SPLITS),
        {side: bands[f"mean_cosine_{side}"] for side in SIDES[:2]} | {"split_half": (low, high)},
    )


def cosine_section(found: CosineSet, random: RandomUpdates | None = None) -> Section:
    """The section ``cosines``.

    Args:
        random: the update's random counterparts; None: not read.
    """
    beside = with_random(
        pd.DataFrame({"site": [found.site]}), random, found.position, [f"mean_cosine_{side}" for side in SIDES]
    ).iloc[0]
    with house_style():
        figure, axes = new_figure(len(SIDES), panel_height_cm=4.6)
        sentences = [draw_histogram(panel, found, side, beside) for panel, side in zip(axes, SIDES, strict=True)]
        axes[-1].set_xlabel("cos(δᵢ, v*)")
        set_titles(figure, axes, sentences)
    return Section(
        name="cosines",
        question="Do the updates of all pairs point the same way?",
        claim="D-STEER, Fig. 3: every prompt’s update has a cosine of .92 to .96 with the mean update v*.",
        sentences=sentences,
        interval=_interval(found),
        limits=[
            "How much of this is one constant shift that any training makes, or a few dimensions of large activations.",
            "Anything beside f and ρ₁: the mean cosine is the same fact told again.",
            "Other seeds, other data and other sites; section consistency has every site.",
        ],
        figure=figure,
        table=cosine_table(found),
        reading=[*_reading(found), f"Here {MISSING}." if random is None else NOTE],
        headlines=[],
    )


def draw_histogram(axes: Axes, found: CosineSet, side: str, beside: pd.Series) -> str:
    """One histogram over its null, with the mean under random weights; returns its message."""
    observed, null = found.shares[side], found.null_shares[side]
    axes.stairs(null, EDGES, fill=True, color=COLOURS["null"], alpha=0.6, zorder=2)
    axes.stairs(observed, EDGES, fill=True, color=COLOURS["policy"], alpha=0.75, zorder=3)
    filled = np.flatnonzero(observed + null)
    low, high = EDGES[filled[0]], EDGES[filled[-1] + 1]
    random, lowest, highest = (float(beside[f"mean_cosine_{side}_random{end}"]) for end in ("", "_low", "_high"))
    if random == random:
        axes.axvspan(lowest, highest, color=COLOURS["random_update"], alpha=0.35, linewidth=0, zorder=1)
        axes.axvline(random, color=COLOURS["random_update"], linewidth=1.0, zorder=4)
        low, high = min(low, lowest), max(high, highest)
    margin = 0.04 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(0, 1.22 * max(observed.max(), null.max()))
    axes.set_ylabel("share of pairs")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    middle = (low + high) / 2
    clear = np.where(observed > 0, 0.0, null)  # the null's label stands where it is not hidden
    null_peak = clear if clear.any() else null
    for shares, word, colour in (
        (null_peak, "signs flipped", COLOURS["mark"]),
        (observed, "observed", COLOURS["policy"]),
    ):
        at = (EDGES[:-1] + EDGES[1:])[int(shares.argmax())] / 2
        side_of = "left" if at < middle else "right"
        text = axes.text(at, shares.max(), word, color=colour, ha=side_of, va="bottom", zorder=4)
        text.set_fontweight("bold")
    ends = " … ".join(as_text(x, ".2f") for x in found.bands[side])
    value = found.means[side].value
    mean = as_text(value, ".3f")
    within = found.bands[side][0] <= value <= found.bands[side][1]
    told = "inside" if within else "outside"
    said = f"{_TITLES[side]}, the mean cosine with v* is {mean}, {told} its null {ends}"
    if random != random:
        return said
    return f"{said}; under random weights (line) {as_text(random, '.3f')}, {as_text(lowest, '.2f')} … {as_text(highest, '.2f')}"


def cosine_table(found: CosineSet) -> pd.DataFrame:
    """The numbers drawn: a row a bin."""
    table = pd.DataFrame({"cosine_low": EDGES[:-1].round(6), "cosine_high": EDGES[1:].round(6)})
    for side in SIDES:
        table[f"{side}_pairs"] = found.counts[side]
        table[f"{side}_null_share"] = found.null_shares[side]
    return table


def _cosines(update: Tensor) -> dict[str, Tensor]:
    """[split or 1, row] by side."""
    found = {"in_sample": in_sample_cosines(update)[None], "leave_one_out": leave_one_out_cosines(update)[None]}
    return found | {"split_half": split_half(update, n_splits=N_SPLITS).cosines}


def _counts(cosines: Tensor) -> np.ndarray:
    known = cosines[~cosines.isnan()].clamp(-1, 1).numpy()
    return np.histogram(known, EDGES)[0]


def _interval(found: CosineSet) -> str:
    value, low, high = (as_text(x, ".3f") for x in found.means["split_half"])
    return (
        f"Mean split-half cosine {value}, 95 % CI {low} … {high} over prompts, v* taken anew. Its null, central 95 %: "
        + " … ".join(as_text(x, ".2f") for x in found.bands["split_half"])
        + "."
    )


def _reading(found: CosineSet) -> list[str]:
    lines = [
        f"δᵢ: change of pair i’s hidden state at {site_name(found.site)}, {found.position}, from base to {found.snapshot}; "
        f"v*: mean change. {found.n_pairs} pairs.",
        "In-sample, v* contains δᵢ itself, which alone gives cosines of about 1/√N. Leave-one-out: v* of the other pairs. "
        f"Split-half: v* of the random half that the pair is not in, {N_SPLITS} splits pooled.",
        f"Grey: the same rows with signs flipped at random, {N_FLIPS} times; the null interval in the title is the central 95 % of "
        f"the same mean over {N_BAND_FLIPS} flips.",
    ]
    n_still = found.n_pairs - round(float(found.counts["in_sample"].sum()))
    if n_still:
        lines.append(f"{n_still} pairs whose state did not change have no cosine.")
    if found.dtype != "float32":
        lines.append(
            f"Rows were stored as {found.dtype}, whose rounding is 5 to 74 % of small updates and lowers the cosines."
        )
    return lines
