"""Do the updates of all pairs point the same way? Cosines with v* pair by pair, from stored rows, beside their null."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from analysis.figures import COLOURS, house_style, new_figure, set_titles
from analysis.observations import site_name
from analysis.report import Section
from analysis.site_axes import as_text
from analysis.stored_rows import StoredRows
from tiltmeter.consistency import in_sample_cosines, leave_one_out_cosines
from tiltmeter.nulls import sign_flip_null

EDGES = np.linspace(-1.0, 1.0, 81)
"""Bins of every cosine histogram, 0.025 wide."""
SIDES = ("in_sample", "leave_one_out")
N_FLIPS = 50
"""Sign flips pooled for the null of single pairs."""
N_BAND_FLIPS = 500
"""Sign flips behind the null band of the mean."""
_TITLES = {"in_sample": "In-sample", "leave_one_out": "Leave-one-out"}


class CosineSet(NamedTuple):
    """cos(δ_i, v*) of every pair at one site; histograms are shares of pairs in the bins of :data:`EDGES`."""

    snapshot: str
    site: str
    position: str
    dtype: str
    n_pairs: int
    shares: dict[str, np.ndarray]
    """By side: in_sample and leave_one_out."""
    counts: dict[str, np.ndarray]
    null_shares: dict[str, np.ndarray]
    """Of the same rows with signs flipped at random, pooled over flips."""
    means: dict[str, float]
    bands: dict[str, tuple[float, float]]
    """Central 95 % of the mean under sign flips."""


def deepest_cosines(rows: StoredRows) -> CosineSet | None:
    """The cosines at the deepest site; None where nothing changed there."""
    site = rows.sites[-1]
    updates = rows.update(site)
    if not updates.any():
        return None
    return cosine_set(updates, snapshot=rows.snapshot, site=site, position=rows.position, dtype=rows.dtype)


def cosine_set(updates: Tensor, *, snapshot: str, site: str, position: str, dtype: str) -> CosineSet:
    """Histograms, means and nulls of the rows of an update; rows of zeros have no direction and are left out."""
    found = _cosines(updates)
    generator = torch.Generator().manual_seed(0)
    flipped: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    for _ in range(N_FLIPS):
        signs = 2.0 * torch.randint(0, 2, (len(updates), 1), generator=generator, dtype=torch.float64) - 1
        for side, values in _cosines(signs * updates).items():
            flipped[side].append(values)
    band = sign_flip_null(updates, n_flips=N_BAND_FLIPS).band()
    counts = {side: _counts(values) for side, values in found.items()}
    nulls = {side: _counts(torch.cat(values)) for side, values in flipped.items()}
    return CosineSet(
        snapshot,
        site,
        position,
        dtype,
        len(updates),
        {side: n / max(n.sum(), 1) for side, n in counts.items()},
        counts,
        {side: n / max(n.sum(), 1) for side, n in nulls.items()},
        {side: float(values.nanmean()) for side, values in found.items()},
        {side: band[f"mean_cosine_{side}"] for side in SIDES},
    )


def cosine_section(found: CosineSet) -> Section:
    """The section ``cosines``."""
    with house_style():
        figure, axes = new_figure(len(SIDES), panel_height_cm=4.6)
        sentences = [draw_histogram(panel, found, side) for panel, side in zip(axes, SIDES, strict=True)]
        axes[-1].set_xlabel("cos(δᵢ, v*)")
        set_titles(figure, axes, sentences)
    return Section(
        name="cosines",
        question="Do the updates of all pairs point the same way?",
        sentences=sentences,
        figure=figure,
        table=cosine_table(found),
        reading=_reading(found),
        headlines=[],
    )


def draw_histogram(axes: Axes, found: CosineSet, side: str) -> str:
    """One histogram over its null; returns its message."""
    observed, null = found.shares[side], found.null_shares[side]
    axes.stairs(null, EDGES, fill=True, color=COLOURS["null"], alpha=0.6, zorder=2)
    axes.stairs(observed, EDGES, fill=True, color=COLOURS["policy"], alpha=0.75, zorder=3)
    filled = np.flatnonzero(observed + null)
    low, high = EDGES[filled[0]], EDGES[filled[-1] + 1]
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
    mean = as_text(found.means[side], ".3f")
    within = found.bands[side][0] <= found.means[side] <= found.bands[side][1]
    told = "inside" if within else "outside"
    return f"{_TITLES[side]}, the mean cosine with v* is {mean}, {told} its null {ends}"


def cosine_table(found: CosineSet) -> pd.DataFrame:
    """The numbers drawn: a row a bin."""
    table = pd.DataFrame({"cosine_low": EDGES[:-1].round(6), "cosine_high": EDGES[1:].round(6)})
    for side in SIDES:
        table[f"{side}_pairs"] = found.counts[side]
        table[f"{side}_null_share"] = found.null_shares[side]
    return table


def _cosines(updates: Tensor) -> dict[str, Tensor]:
    return {"in_sample": in_sample_cosines(updates), "leave_one_out": leave_one_out_cosines(updates)}


def _counts(cosines: Tensor) -> np.ndarray:
    known = cosines[~cosines.isnan()].clamp(-1, 1).numpy()
    return np.histogram(known, EDGES)[0]


def _reading(found: CosineSet) -> list[str]:
    lines = [
        f"δᵢ: change of pair i’s hidden state at {site_name(found.site)}, {found.position}, from base to {found.snapshot}; "
        f"v*: mean change. {found.n_pairs} pairs.",
        "In-sample, v* contains δᵢ itself, which alone gives cosines of about 1/√N. Leave-one-out compares δᵢ with the mean of the "
        "other pairs.",
        f"Grey: the same rows with signs flipped at random, {N_FLIPS} times; the null interval in the title is the central 95 % of "
        f"the mean over {N_BAND_FLIPS} flips.",
        "Not shown: how much of this is one constant shift that any training makes, or a few dimensions of large activations. The "
        "mean cosine is not evidence beside f and ρ₁, but the same fact.",
    ]
    n_still = found.n_pairs - int(found.counts["in_sample"].sum())
    if n_still:
        lines.append(f"{n_still} pairs whose state did not change have no cosine.")
    if found.dtype != "float32":
        lines.append(
            f"Rows were stored as {found.dtype}, whose rounding is 5 to 74 % of small updates and lowers the cosines."
        )
    return lines
