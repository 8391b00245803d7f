"""Where do hidden states move, seen along what the preference asks for? Each pair's step from base to policy (Fig. 1a)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from analysis.open.observations import DIVERGE, USUAL_POSITION, site_name
from analysis.open.probe_pairs import PROMPTS_FILE, read_probe_pairs
from analysis.open.stored_head import unembedding_rows
from analysis.open.stored_rows import StoredRows
from analysis.report.page import Section
from analysis.report.site_axes import as_text
from analysis.report.style import COLOURS, house_style, new_figure, set_titles
from tiltmeter.geometry.directions import principal_directions
from tiltmeter.geometry.projections import ProjectionChange, ProjectionSummary, projection_change, summarize_projections
from tiltmeter.states.probe_set import cut_pair


class Parting(NamedTuple):
    """Rows whose state predicts the first tokens in which the pair's responses differ, and v of each."""

    rows: StoredRows
    kept: Sequence[int]
    """Which of the rows."""
    v: Float[Tensor, "kept d_model"]
    """e_w − e_l of each kept row."""
    model: str
    """Folder that the unembedding was read from."""

    @property
    def clusters(self) -> list[str]:
        """Prompt of each kept row."""
        return [self.rows.clusters[i] for i in self.kept]

    def change(self, site: str) -> ProjectionChange:
        """Projections onto v at a site."""
        return projection_change(self.rows.base[site][self.kept], self.rows.policy[site][self.kept], self.v)


class PlanePoints(NamedTuple):
    """Coordinates at one site: along each pair's own v, and along two directions of what is left of h without v."""

    base: Float[Tensor, "kept 3"]
    policy: Float[Tensor, "kept 3"]
    energy_shares: tuple[float, float, float]
    """Of the update's squared norm, along each axis."""


def parting_of(rows: StoredRows | None, run_dir: Path) -> Parting | None:
    """v for the rows that have one; None where the run kept no prompts or no readable model, or no row can be used.

    Rows read at ``diverge`` can all be used. Of rows read at ``prompt_last`` those can whose responses differ in their very
    first token: the state there is the one that predicts it.

    Raises:
        UserError: a file is damaged; names it.
    """
    if rows is None or rows.position not in (DIVERGE, USUAL_POSITION):
        return None
    parts = {}
    for pair in read_probe_pairs(run_dir / PROMPTS_FILE):
        cut = cut_pair(pair.ids, ["diverge"])
        w, other = cut.chosen_ids[-1], cut.rejected_ids[-1]
        if w != other and (rows.position == DIVERGE or len(cut.chosen_ids) == 1):
            parts[pair.pair_id] = w, other
    kept = [i for i, name in enumerate(rows.pair_ids) if name in parts]
    if len(kept) < 4:
        return None
    tokens = [parts[rows.pair_ids[i]] for i in kept]
    for name in (
        "base",
        "aligned",
    ):  # v is the base's; without a copy of it, that of the aligned model, usually the same
        e = unembedding_rows(run_dir / name, [token for pair in tokens for token in pair])
        if e is not None and e.shape[1] == rows.base[rows.sites[-1]].shape[1]:
            return Parting(rows, kept, e[0::2] - e[1::2], name)
    return None


def preference_plane_section(parting: Parting | None) -> Section | None:
    """The section ``preference_plane``, with the table ``projections``; None where there is no v."""
    if parting is None:
        return None
    site = parting.rows.sites[-1]
    summary = summarize_projections(parting.change(site), parting.clusters)
    points = plane_points(parting, site)
    with house_style():
        figure, axes = new_figure(2, panel_height_cm=6.6)
        sentences = [
            draw_steps(axes[0], points, 1, said_of_growth(summary, site)),
            draw_steps(axes[1], points, 2, said_of_shares(points, parting.v.shape[1])),
        ]
        set_titles(figure, axes, sentences)
    return Section(
        name="preference_plane",
        question="Where do hidden states move, seen along the preference?",
        claim="D-STEER, Fig. 1a: hidden states move along the preference vector v, pair by pair.",
        sentences=sentences,
        interval=_interval(summary, site),
        limits=[
            "Anything but what was trained: DPO’s loss asks for ⟨h, v⟩ to grow at the final norm’s output.",
            "The rest of the space, which two components hide. Each pair is drawn on another v: arrows side by side need not be "
            "parallel in truth.",
            "What shuffled labels or SFT do, and whether the step causes what is written.",
        ],
        figure=figure,
        table=_points_table(parting, points),
        reading=_reading(parting, site),
        headlines=[],
        more_tables={"projections": projections_table(parting)},
    )


def projections_table(parting: Parting) -> pd.DataFrame:
    """⟨h, v⟩/‖v‖ of every pair and site: base, policy and change, in activation units."""
    parts = []
    for site in parting.rows.sites:
        change = {name: values.numpy() for name, values in parting.change(site)._asdict().items()}
        parts.append(pd.DataFrame(_where(parting) | {"site": site} | change))
    return pd.concat(parts, ignore_index=True)


def plane_points(parting: Parting, site: str) -> PlanePoints:
    """Along each pair's own v, and the first two principal components of h less its part along v, of base and policy together."""
    base, policy = parting.rows.base[site][parting.kept].double(), parting.rows.policy[site][parting.kept].double()
    unit = parting.v.double() / parting.v.double().norm(dim=1, keepdim=True)
    along = [(h * unit).sum(1, keepdim=True) for h in (base, policy)]
    rest = [h - part * unit for h, part in zip((base, policy), along, strict=True)]
    both = torch.cat(rest)
    directions = principal_directions(both, 2, centred=True).directions
    at = [torch.cat([a, (r - both.mean(0)) @ directions.T], dim=1) for a, r in zip(along, rest, strict=True)]
    energies = (at[1] - at[0]).square().sum(0) / (policy - base).square().sum()
    first, second, third = energies.tolist()
    return PlanePoints(at[0], at[1], (first, second, third))


def draw_steps(axes: Axes, points: PlanePoints, component: int, sentence: str) -> str:
    """An arrow a pair from base to policy, and the mean step; returns the sentence."""
    axis = [0, component]
    base, policy = points.base[:, axis].numpy(), points.policy[:, axis].numpy()
    step = policy - base
    grown = step[:, 0] > 0
    look: dict[str, Any] = {
        "angles": "xy",
        "scale_units": "xy",
        "scale": 1,
        "width": 0.003,
        "headwidth": 4,
        "alpha": 0.6,
    }
    for kept, colour in ((grown, COLOURS["policy"]), (~grown, COLOURS["mark"])):
        axes.quiver(*base[kept].T, *step[kept].T, color=colour, **look)
    axes.scatter(base[:, 0], base[:, 1], s=3, color=COLOURS["base"], linewidths=0, zorder=3)
    start, mean = base.mean(0), step.mean(0)
    axes.quiver(*start, *mean, color=COLOURS["policy_dark"], zorder=4, **look | {"width": 0.012, "alpha": 1})
    ends = np.concatenate([base, policy])
    low, high = ends.min(0), ends.max(0)
    margin = 0.04 * (high - low)
    axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
    axes.set_ylim(low[1] - margin[1], high[1] + 0.14 * (high[1] - low[1]))
    for x, word, colour in (
        (0.01, "base", COLOURS["base"]),
        (0.15, "→ policy, grew", COLOURS["policy"]),
        (0.46, "→ fell", COLOURS["mark"]),
        (0.62, "→ mean step", COLOURS["policy_dark"]),
    ):
        axes.text(x, 0.99, word, color=colour, transform=axes.transAxes, va="top", weight="bold")
    axes.grid(visible=False)
    axes.set_xlabel("⟨h, v⟩ / ‖v‖, each pair’s own v (activation units)")
    axes.set_ylabel(f"PC{component} of h without v")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    return sentence


def said_of_growth(summary: ProjectionSummary, site: str) -> str:
    """In how many pairs the projection grew, and by how much on average."""
    share, low, high = (as_text(x, "percent") for x in summary.share_grown)
    change, least, most = (as_text(x, "+.2f") for x in summary.change)
    return (
        f"⟨h, v⟩ grew in {share} of the pairs at {site_name(site)} (95\u00a0% CI {low} … {high}); its mean change is {change} "
        f"({least} … {most})"
    )


def _interval(summary: ProjectionSummary, site: str) -> str:
    change, least, most = (as_text(x, "+.2f") for x in summary.change)
    return f"Mean change at {site_name(site)}: {change}, 95 % CI {least} … {most}, prompts resampled, base and policy paired."


def said_of_shares(points: PlanePoints, d_model: int) -> str:
    """How much of the update lies along each axis."""
    v, first, second = (as_text(100 * share, ".1f") + "\u00a0%" for share in points.energy_shares)
    chance = as_text(100 / d_model, ".1f") + "\u00a0%"
    return (
        f"Of the update’s energy {v} lies along v (a random direction: {chance}), {first} along PC1 and {second} along PC2 "
        "of the rest"
    )


def _where(parting: Parting) -> dict[str, object]:
    ids = [parting.rows.pair_ids[i] for i in parting.kept]
    return {"snapshot": parting.rows.snapshot, "position": parting.rows.position, "pair_id": ids}


def _points_table(parting: Parting, points: PlanePoints) -> pd.DataFrame:
    named = {"base": points.base, "policy": points.policy}
    columns = {
        f"{of}_{axis}": at[:, i].numpy() for of, at in named.items() for i, axis in enumerate(("v", "pc1", "pc2"))
    }
    return pd.DataFrame(_where(parting) | {"site": parting.rows.sites[-1]} | columns)


def _reading(parting: Parting, site: str) -> list[str]:
    rows = parting.rows
    lines = [
        "v = e(chosen) − e(rejected): unembeddings of the first tokens in which a pair’s responses differ, each pair’s own; "
        f"h is the state that predicts them. Unembedding: of {parting.model}/.",
        f"An arrow is one pair at {site_name(site)}, from base to {rows.snapshot}. PC1, PC2: principal components of h without "
        "its part along v, of base and policy together, less their mean.",
        "Intervals: prompts resampled, base and policy paired. projections.csv has every pair at every site.",
    ]
    if len(parting.kept) < rows.n_rows:
        lines.insert(
            1,
            f"{len(parting.kept)} of {rows.n_rows} rows: states were stored at {rows.position}, which is that state only where "
            f"the very first tokens differ. callbacks=full stores {DIVERGE} for all pairs.",
        )
    return [*lines, *rows.notes()]
