"""Is the aligned model's cloud of hidden states the base's, moved by v*? Planes, and distances in all dimensions."""

import math
from functools import partial
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from analysis.open.observations import site_name
from analysis.open.observed import Observed, Tables, about, row_notes, shown_points
from analysis.report.page import Section
from analysis.report.site_axes import as_text, draw_panels
from analysis.report.style import COLOURS
from tiltmeter.geometry.consistency import shift_shares_of_gram
from tiltmeter.geometry.directions import principal_directions
from tiltmeter.geometry.energy_distance import energy_kernel, kernels_after_shift
from tiltmeter.geometry.rows import in_own_span
from tiltmeter.states.capture import ReadPoint
from tiltmeter.states.state_pair import StatePair
from tiltmeter.stats.among_random import among_random
from tiltmeter.stats.jackknife import SHARE, jackknife_interval

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


def cloud_tables(seen: Observed) -> Tables | None:
    """``clouds``: points of the planes; ``cloud_distances``: a row a site; ``clouds_about``: a row a plane."""
    if (rows := seen.at()) is None:
        return None
    shown = [point for point in shown_points(rows) if rows.update(point).any()]
    if not shown or len(set(rows.clusters_of(shown[0]))) < 4:
        return None
    distances = [cloud_distances(rows, p, n_random=N_RANDOM if p in shown else 0) for p in rows.points]
    planes, shares = zip(*(cloud_plane(rows, point) for point in shown), strict=True)
    said = about(rows, shown).join(pd.DataFrame(shares, columns=["pc1_variance", "pc2_variance"]))
    return {
        "clouds": pd.concat(planes, ignore_index=True),
        "cloud_distances": pd.DataFrame(distances),
        "clouds_about": said,
    }


def cloud_plane(rows: StatePair, point: ReadPoint) -> tuple[pd.DataFrame, tuple[float, float]]:
    """h₀, h_π and h₀ ± v* on the first two principal components of h₀ and h_π together, centred on their common mean.

    Returns:
        A row for each pair and cloud; and the share of the variance of h₀ and h_π together along each axis.
    """
    base, policy = (found.double() for found in rows.rows(point))
    both = torch.cat([base, policy])
    found = principal_directions(both, 2, centred=True)
    v = (policy - base).mean(0)
    clouds = {"base": base, "policy": policy, "base_plus": base + v, "base_minus": base - v}
    where = {"snapshot": rows.name, "position": point.position, "site": point.site, "pair_id": rows.ids_of(point)}
    parts = []
    for cloud, points in clouds.items():
        at = (points - both.mean(0)) @ found.directions.T
        parts.append(pd.DataFrame(where | {"cloud": cloud, "pc1": at[:, 0].numpy(), "pc2": at[:, 1].numpy()}))
    first, second = found.energy_shares.tolist()
    return pd.concat(parts, ignore_index=True), (first, second)


def cloud_distances(rows: StatePair, point: ReadPoint, *, n_random: int) -> dict[str, str | float]:
    """Share of the way from the base's cloud to the policy's that v* goes, at one site; in all dimensions.

    ``energy_distance_base``: energy distance of h₀ and h_π, activation units. ``distance_left``: that of h₀ + v* and h_π over it,
    0 when v* explains all, 1 when nothing; ``…_random``: for random vectors as long as v*, mean and where one more would lie.
    ``shift_share``: f, 1/N added by chance. ``left_per_pair_…``: ‖δ_i − v*‖/‖δ_i‖ over pairs, with v* of the other pairs.

    v* is always of other prompts than the two that are compared (:func:`tiltmeter.geometry.energy_distance.kernels_after_shift`).
    Intervals are over prompts, with v* held fixed.
    """
    clusters, wide_base, wide_update = rows.clusters_of(point), rows.base[point].rows.double(), rows.update(point)
    base, update = in_own_span(torch.cat([wide_base, wide_update])).chunk(2)
    apart, moved, compared = kernels_after_shift(base, update, clusters)
    left = jackknife_interval(lambda w: _quadratic(w, moved) / _quadratic(w, apart), clusters)
    generator = torch.Generator().manual_seed(0)
    length, random = update.mean(0).norm(), []
    for _ in range(n_random):  # in all dimensions: a random vector leaves the rows' span
        vector = torch.randn(wide_base.shape[1], generator=generator, dtype=torch.float64)
        kernel = energy_kernel(wide_base + length * vector / vector.norm(), wide_base + wide_update) * compared
        random.append(float(kernel.sum() / apart.sum()))
    among = among_random(torch.tensor([left.value]), torch.tensor([random], dtype=torch.float64))
    share = jackknife_interval(shift_shares_of_gram(update @ update.T), clusters, second_order=True, scale=SHARE)
    figures: dict[str, str | float] = {"snapshot": rows.name, "position": point.position, "site": point.site}
    figures |= {"n_rows": rows.n_rows, "energy_distance_base": float(apart.sum() / compared.sum())}
    for name, interval in (("distance_left", left), ("shift_share", share), ("distance_left_random", among.prediction)):
        figures |= interval.named(name)
    return figures | dict(zip(("left_per_pair_median", "left_per_pair_q90"), _left_per_pair(update), strict=True))


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


def draw_clouds(tables: Tables) -> Section:
    """The section of what :func:`cloud_tables` made."""
    points, said = tables["clouds"], tables["clouds_about"]
    fits = tables["cloud_distances"].set_index("site")
    panels = [partial(draw_plane, plane=plane, fit=fits.loc[plane["site"]]) for _, plane in said.iterrows()]
    figure, sentences = draw_panels(panels, points, panel_height_cm=7.0)
    last = said["site"].iloc[-1]
    return Section(
        name="clouds",
        question="Is the aligned model’s cloud the base’s, moved by one vector?",
        claim="D-STEER, Fig. 1c: aligned and inverted hidden states are symmetric translates of the base’s, by ±v*.",
        sentences=sentences,
        interval=_interval(last, fits.loc[last]),
        limits=[
            "A finding in the symmetry of h₀ + v* and h₀ − v*: it is true by construction, of any vector. Only how close h₀ + v* "
            "comes to the real hπ is one.",
            "The other dimensions: PC1 is often the shift itself.",
            "Equal behaviour: close clouds don’t make it, that is for steering to show.",
            "Evidence beside f: that a shift explains the clouds is f again.",
        ],
        figure=figure,
        table=points,
        reading=_reading(said, fits.loc[last]),
        more_tables={name: tables[name] for name in ("cloud_distances", "clouds_about")},
    )


def draw_plane(axes: Axes, all_points: pd.DataFrame, plane: pd.Series, fit: pd.Series) -> str:
    """Four clouds and the means they lie around, at the site of one plane."""
    here = all_points[all_points["site"] == plane["site"]]
    for cloud, (label, colour, marker) in LOOKS.items():
        points = here[here["cloud"] == cloud]
        look: dict[str, Any] = {"facecolors": "none", "edgecolors": colour} if marker == "o" else {"color": colour}
        axes.scatter(points["pc1"], points["pc2"], s=7, marker=marker, linewidths=0.6, alpha=0.7, label=label, **look)
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(visible=False)
    for axis, number in ((axes.xaxis, 1), (axes.yaxis, 2)):
        axis.set_label_text(f"PC{number} ({as_text(plane[f'pc{number}_variance'], 'percent')} of the variance)")
        axis.set_major_locator(MaxNLocator(nbins=5))
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, frameon=False, handletextpad=0.1, columnspacing=1
    )
    value, low, high = _interval_text(fit, "distance_left")
    return (
        f"At {site_name(plane['site'])}, h₀ + v* is {value} as far from hπ as h₀ is (95\u00a0% CI {low} … "
        f"{high}); 95\u00a0% of random vectors as long leave {as_text(fit['distance_left_random_low'], 'percent')} or more"
    )


def _interval(site: str, fit: pd.Series) -> str:
    left, share = (_interval_text(fit, name) for name in ("distance_left", "shift_share"))
    return (
        f"At {site_name(site)}: distance left {left[0]}, 95 % CI {left[1]} … {left[2]}; f {share[0]}, 95 % CI {share[1]} … "
        f"{share[2]}. Over prompts, the v* that is added held fixed."
    )


def _interval_text(fit: pd.Series, name: str) -> list[str]:
    """Value and ends in percent, with a digit more where they are near 0."""
    ends = [float(fit[f"{name}{end}"]) for end in ("", "_low", "_high")]
    return [as_text(x, "percent") if abs(x) >= 0.095 else as_text(100 * x, ".1f") + "\u00a0%" for x in ends]


def _reading(said: pd.DataFrame, fit: pd.Series) -> list[str]:
    here = said.iloc[0]
    return [
        f"h₀, hπ: hidden states of base and policy ({here['snapshot']}) at {here['position']}, {here['n_rows']} of each; v*: mean "
        "of hπ − h₀. Plane: first two principal components of h₀ and hπ together, less their common mean.",
        "Closeness is the energy distance (Székely and Rizzo 2013) in all dimensions, over that of h₀ and hπ; it "
        "grows with the square of a small shift. v* is of other prompts than the two compared; "
        f"about 0, also below: no difference left. Random vectors: "
        f"where one more of them would lie, by {N_RANDOM} as long as v*.",
        f"Pair by pair more is left: at the last site the shift is {as_text(fit['shift_share'], 'percent')} of ΔH (f), and a "
        f"pair’s own change still differs from v* of the others by {as_text(fit['left_per_pair_median'], 'percent')} of its length "
        "(median). cloud_distances.csv has every site.",
        *row_notes(said),
    ]
