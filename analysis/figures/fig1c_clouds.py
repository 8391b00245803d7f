"""Is the aligned model's cloud of hidden states the base's, moved by v*? Planes, and distances in all dimensions."""

import math
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from analysis.open.observations import site_name
from analysis.open.stored_rows import StoredRows
from analysis.report.page import Section
from analysis.report.site_axes import as_text
from analysis.report.style import COLOURS, house_style, new_figure, set_titles
from tiltmeter.geometry.consistency import shift_shares_of_gram
from tiltmeter.geometry.directions import principal_directions
from tiltmeter.geometry.energy_distance import energy_kernel, random_halves
from tiltmeter.geometry.rows import in_own_span
from tiltmeter.stats.among_random import among_random
from tiltmeter.stats.jackknife import SHARE, Interval, jackknife_interval

N_SPLITS = 4
"""Random halves of the prompts: v* from one, the clouds of the other."""
N_RANDOM = 20
"""Random vectors as long as v*, for comparison."""
LOOKS = {
    "base": ("h₀", COLOURS["base"], "o"),
    "policy": ("hπ", COLOURS["policy"], "o"),
    "base_plus": ("h₀ + v*", COLOURS["policy_dark"], "x"),
    "base_minus": ("h₀ − v*", COLOURS["null"], "x"),
}
"""Cloud → label, colour and marker."""


class CloudFit(NamedTuple):
    """How much of the way from the base's cloud to the policy's v* goes, at one site; in all dimensions."""

    base_distance: float
    """Energy distance of h₀ and h_π, activation units."""
    left: Interval
    """Energy distance of h₀ + v* and h_π over it: 0 when v* explains all, 1 when nothing."""
    left_random: Interval
    """The same for random vectors as long as v*: mean of :data:`N_RANDOM`, and where one more would lie; NaN where not taken."""
    shift_share: Interval
    """f: share of ΔH that is the constant shift, 1/N added by chance."""
    left_per_pair: tuple[float, float]
    """Median and 90 % quantile over pairs of ‖δ_i − v*‖/‖δ_i‖, with v* of the other pairs."""


def cloud_section(rows: StoredRows) -> Section | None:
    """The section ``clouds``, with the table ``cloud_distances``; None where nothing changed or all rows are of one prompt."""
    shown = [site for site in rows.shown_sites() if rows.update(site).any()]
    if not shown or len(set(rows.clusters)) < 4:
        return None
    fits = {site: cloud_fit(rows, site, n_random=N_RANDOM if site in shown else 0) for site in rows.sites}
    planes = {site: cloud_plane(rows, site) for site in shown}
    with house_style():
        figure, axes = new_figure(len(shown), panel_height_cm=7.0)
        sentences = [draw_plane(a, planes[s], s, fits[s]) for a, s in zip(axes, shown, strict=True)]
        set_titles(figure, axes, sentences)
    return Section(
        name="clouds",
        question="Is the aligned model’s cloud the base’s, moved by one vector?",
        claim="D-STEER, Fig. 1c: aligned and inverted hidden states are symmetric translates of the base’s, by ±v*.",
        sentences=sentences,
        interval=_interval(shown[-1], fits[shown[-1]]),
        limits=[
            "A finding in the symmetry of h₀ + v* and h₀ − v*: it is true by construction, of any vector. Only how close h₀ + v* "
            "comes to the real hπ is one.",
            "The other dimensions: PC1 is often the shift itself.",
            "Equal behaviour: close clouds don’t make it, that is for steering to show.",
            "Evidence beside f: that a shift explains the clouds is f again.",
        ],
        figure=figure,
        table=pd.concat([plane.table for plane in planes.values()], ignore_index=True),
        reading=_reading(rows, fits[shown[-1]]),
        headlines=[],
        more_tables={"cloud_distances": pd.DataFrame([_figures(rows, site, fit) for site, fit in fits.items()])},
    )


class Plane(NamedTuple):
    """Points of one panel: a row for each pair and cloud."""

    table: pd.DataFrame
    energy_shares: tuple[float, float]
    """Of the variance of h₀ and h_π together, along each axis."""


def cloud_plane(rows: StoredRows, site: str) -> Plane:
    """h₀, h_π and h₀ ± v* on the first two principal components of h₀ and h_π together, centred on their common mean."""
    base, policy = rows.base[site].double(), rows.policy[site].double()
    both = torch.cat([base, policy])
    found = principal_directions(both, 2, centred=True)
    v = (policy - base).mean(0)
    clouds = {"base": base, "policy": policy, "base_plus": base + v, "base_minus": base - v}
    parts = []
    for cloud, points in clouds.items():
        at = (points - both.mean(0)) @ found.directions.T
        where = {"snapshot": rows.snapshot, "position": rows.position, "site": site, "pair_id": rows.pair_ids}
        parts.append(pd.DataFrame(where | {"cloud": cloud, "pc1": at[:, 0].numpy(), "pc2": at[:, 1].numpy()}))
    first, second = found.energy_shares.tolist()
    return Plane(pd.concat(parts, ignore_index=True), (first, second))


def cloud_fit(rows: StoredRows, site: str, *, n_random: int) -> CloudFit:
    """Distances of the clouds at one site, v* always from prompts that are not in the clouds compared.

    Each of :data:`N_SPLITS` random halves of the prompts gives a v* for the other half; points are compared inside a half only,
    and the distance is the mean over halves and splits. Intervals are over prompts, with v* held fixed.
    """
    base, update = in_own_span(torch.cat([rows.base[site].double(), rows.update(site)])).chunk(2)
    policy = base + update
    same = [half[:, None] == half for half in random_halves(rows.clusters, n_splits=N_SPLITS)]
    n_compared = torch.stack(same).sum(0).double().fill_diagonal_(0.0)
    apart = energy_kernel(base, policy) * n_compared
    moved = torch.zeros_like(apart)
    for mates in same:
        others = (~mates).double()
        moved += energy_kernel(base + others @ update / others.sum(1, keepdim=True), policy) * mates
    left = jackknife_interval(lambda w: _quadratic(w, moved) / _quadratic(w, apart), rows.clusters)
    generator = torch.Generator().manual_seed(0)
    wide_base, wide_update = rows.base[site].double(), rows.update(site)  # a random vector leaves the rows' span
    length, random = update.mean(0).norm(), []
    for _ in range(n_random):
        vector = torch.randn(rows.base[site].shape[1], generator=generator, dtype=torch.float64)
        kernel = energy_kernel(wide_base + length * vector / vector.norm(), wide_base + wide_update) * n_compared
        random.append(float(kernel.sum() / apart.sum()))
    among = among_random(torch.tensor([left.value]), torch.tensor([random], dtype=torch.float64))
    gram = update @ update.T
    share = jackknife_interval(shift_shares_of_gram(gram), rows.clusters, second_order=True, scale=SHARE)
    return CloudFit(
        float(apart.sum() / n_compared.sum()),
        left,
        among.prediction,
        share,
        _left_per_pair(update),
    )


def draw_plane(axes: Axes, plane: Plane, site: str, fit: CloudFit) -> str:
    """Four clouds and the means they lie around."""
    for cloud, (label, colour, marker) in LOOKS.items():
        points = plane.table[plane.table["cloud"] == cloud]
        look: dict[str, Any] = {"facecolors": "none", "edgecolors": colour} if marker == "o" else {"color": colour}
        axes.scatter(points["pc1"], points["pc2"], s=7, marker=marker, linewidths=0.6, alpha=0.7, label=label, **look)
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(visible=False)
    for axis, share, number in zip((axes.xaxis, axes.yaxis), plane.energy_shares, (1, 2), strict=True):
        axis.set_label_text(f"PC{number} ({as_text(share, 'percent')} of the variance)")
        axis.set_major_locator(MaxNLocator(nbins=5))
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, frameon=False, handletextpad=0.1, columnspacing=1
    )
    value, low, high = (_small(x) for x in fit.left)
    return (
        f"At {site_name(site)}, h₀ + v* is {value} as far from hπ as h₀ is (95\u00a0% CI {low} … "
        f"{high}); 95\u00a0% of random vectors as long leave {as_text(fit.left_random.low, 'percent')} or more"
    )


def _interval(site: str, fit: CloudFit) -> str:
    left, share = ([_small(x) for x in interval] for interval in (fit.left, fit.shift_share))
    return (
        f"At {site_name(site)}: distance left {left[0]}, 95 % CI {left[1]} … {left[2]}; f {share[0]}, 95 % CI {share[1]} … "
        f"{share[2]}. Over prompts, the v* that is added held fixed."
    )


def _small(share: float) -> str:
    """A share in percent, with a digit more where it is near 0."""
    return as_text(share, "percent") if abs(share) >= 0.095 else as_text(100 * share, ".1f") + "\u00a0%"


def _left_per_pair(update: Tensor) -> tuple[float, float]:
    """Median and 90 % quantile of ‖δ_i − v*₋ᵢ‖ / ‖δ_i‖, which is N/(N−1) times that with v* of all."""
    lengths = update.norm(dim=1)
    left = (update - update.mean(0)).norm(dim=1)[lengths > 0] / lengths[lengths > 0] * len(update) / (len(update) - 1)
    middle, most = (
        left.quantile(torch.tensor([0.5, 0.9], dtype=torch.float64)).tolist() if len(left) else (math.nan,) * 2
    )
    return middle, most


def _quadratic(weights: Tensor, kernel: Tensor) -> Tensor:
    """wᵀKw of each row of weights."""
    return (weights @ kernel * weights).sum(1)


def _figures(rows: StoredRows, site: str, fit: CloudFit) -> dict[str, str | float]:
    figures: dict[str, str | float] = {"snapshot": rows.snapshot, "position": rows.position, "site": site}
    figures |= {"n_rows": rows.n_rows, "energy_distance_base": fit.base_distance}
    for name, interval in (("distance_left", fit.left), ("shift_share", fit.shift_share)):
        figures |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    random = dict(zip(("", "_low", "_high"), fit.left_random, strict=True))
    figures |= {f"distance_left_random{end}": value for end, value in random.items()}
    return figures | dict(zip(("left_per_pair_median", "left_per_pair_q90"), fit.left_per_pair, strict=True))


def _reading(rows: StoredRows, fit: CloudFit) -> list[str]:
    return [
        f"h₀, hπ: hidden states of base and policy ({rows.snapshot}) at {rows.position}, {rows.n_rows} of each; v*: mean of "
        "hπ − h₀. Plane: first two principal components of h₀ and hπ together, less their common mean.",
        "Closeness is the energy distance (Székely and Rizzo 2013) in all dimensions, over that of h₀ and hπ; it "
        "grows with the square of a small shift. v* comes from one half of the prompts, the clouds from the other, "
        f"{N_SPLITS} splits; about 0, also below: no difference left. Random vectors: "
        f"where one more of them would lie, by {N_RANDOM} as long as v*.",
        f"Pair by pair more is left: at the last site the shift is {as_text(fit.shift_share.value, 'percent')} of ΔH (f), and a "
        f"pair’s own change still differs from v* of the others by {as_text(fit.left_per_pair[0], 'percent')} of its length "
        "(median). cloud_distances.csv has every site.",
        *rows.notes(),
    ]
