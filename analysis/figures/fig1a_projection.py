"""Do hidden states move along what the preference asks for? Fig. 1a: projections onto v and v̄ by site, and pair by pair."""

from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from analysis.open.observations import DIVERGE, USUAL_POSITION, after_steps, deepest, latest, site_name
from analysis.open.observed import Observed, Tables, about, row_notes
from analysis.report.page import Headline, Section
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
)
from analysis.report.style import COLOURS, EndLabel, mark_level
from tiltmeter.geometry.directions import principal_directions
from tiltmeter.geometry.projections import projection_change, summarize_projections
from tiltmeter.metric_names import metric
from tiltmeter.states.capture import ReadPoint
from tiltmeter.states.probe_set import cut_pair
from tiltmeter.states.state_pair import StatePair

_INTERVALS = ("delta", "share_grown")
DIRECTIONS = {"token": "projection", "sequence": "projection_sequence"}
"""Kind of direction, v of the first differing tokens or v̄ of whole responses → family in metrics.csv."""
_NAMES = {"token": "v", "sequence": "v̄"}
_STYLES = {"token": "-", "sequence": "--"}
_COLOURS = {"token": COLOURS["policy_dark"], "sequence": COLOURS["policy"]}
_GREY = COLOURS["mark"]
HYPERPLANE = metric("hyperplane", "share_preferred")
_AXES = ("v", "pc1", "pc2")
"""Axes of the plane: along each pair's own v, and along two directions of what is left of h without v."""


def projection_tables(seen: Observed) -> Tables | None:
    """``projection``: as last observed, with 95 % intervals, and cos(v*, ·), a row a site; ``projection_about``."""
    names: dict[str, str] = {}
    for kind, family in DIRECTIONS.items():
        names |= {f"{kind}_{what}": metric(family, what) for what in ("base", "policy")}
        names |= {
            f"{kind}_{what}{end}": metric(family, f"{what}{end}")
            for what in _INTERVALS
            for end in ("", "_low", "_high")
        }
        names[f"cosine_{kind}"] = metric("direction_cosine", kind)
    there = seen.table.reindex(columns=["steps_taken", "position", "site", *names.values()])
    changed = there[(there["position"] == DIVERGE) & there[names["token_delta"]].notna()]
    if changed.empty:
        return None
    last = latest(changed).set_axis(["steps_taken", "position", "site", *names], axis=1)
    preferred = seen.metrics.reindex(columns=[HYPERPLANE])[HYPERPLANE].dropna().tail(1)
    return {"projection": last, "projection_about": pd.DataFrame({"share_preferred": preferred.tolist() or [np.nan]})}


def draw_projections(tables: Tables) -> Section:
    """The section of what :func:`projection_tables` made."""
    last = tables["projection"]
    panels: list[Panel] = [draw_change, draw_share_grown]
    panels += [draw_direction_cosines] if last["cosine_token"].notna().any() else []
    figure, sentences = draw_over_sites(panels, last, panel_height_cm=5.4)
    return Section(
        name="projection",
        question="Do hidden states move along what the preference asks for?",
        claim="D-STEER, Fig. 1a: the projection of hidden states onto the preference vector v grows with DPO.",
        sentences=sentences,
        interval=_interval(last),
        limits=[
            "More than was trained: DPO’s loss asks for a larger difference of these logits, so growth at the final norm’s output "
            "is no discovery. Further up v is a direction that later layers still rotate, so growth there is weaker evidence.",
            "Whether this shift causes what the model writes; that is for steering to say.",
        ],
        figure=figure,
        table=last,
        reading=_reading(float(tables["projection_about"]["share_preferred"].iloc[0])),
        headlines=_headlines(last),
        more_tables={"projection_about": tables["projection_about"]},
    )


def draw_change(axes: Axes, last: pd.DataFrame) -> str:
    """⟨h, v⟩/‖v‖, policy − base, with paired intervals."""
    sites = last["site"].tolist()
    prepare_sites(axes, sites)
    mark_level(axes, 0.0)
    labels = [EndLabel(0.0, "no change", _GREY), *_curves(axes, last, "{}_delta")]
    axes.set_ylabel("change of ⟨h, v⟩ / ‖v‖\n(activation units)")
    finish_sites(axes, sites, labels, room=0.27)
    site = deepest(sites)
    row = last[last["site"] == site].iloc[0]
    low, high = (as_text(float(row[f"token_delta_{end}"]), "+.2f") for end in ("low", "high"))
    if row["token_delta_low"] > 0 or row["token_delta_high"] < 0:
        verb = "grows" if row["token_delta"] > 0 else "falls"
        said = f"{verb} by {as_text(abs(float(row['token_delta'])), '.2f')}"
    else:
        said = f"changes by {as_text(float(row['token_delta']), '+.2f')}, not distinguishable from 0,"
    return f"The projection onto v {said} at {site_name(site)} (95 % CI {low} … {high})"


def draw_share_grown(axes: Axes, last: pd.DataFrame) -> str:
    """Share of pairs whose projection grew, with intervals."""
    sites = last["site"].tolist()
    prepare_sites(axes, sites)
    mark_level(axes, 0.5)
    labels = [EndLabel(0.5, "half", _GREY), *_curves(axes, last, "{}_share_grown")]
    axes.set_ylim(-0.02, 1.04)
    axes.set_ylabel("share of pairs that grew")
    finish_sites(axes, sites, labels, room=0.27)
    site = deepest(sites)
    row = last[last["site"] == site].iloc[0]
    low, high = (as_text(float(row[f"token_share_grown_{end}"]), "percent") for end in ("low", "high"))
    share = as_text(float(row["token_share_grown"]), "percent")
    return f"It grew in {share} of the pairs at {site_name(site)} (95 % CI {low} … {high})"


def draw_direction_cosines(axes: Axes, last: pd.DataFrame) -> str:
    """cos(v*, v) and cos(v*, v̄), means over pairs."""
    sites = last["site"].tolist()
    prepare_sites(axes, sites)
    mark_level(axes, 0.0)
    labels = [EndLabel(0.0, "none", _GREY), *_curves(axes, last, "cosine_{}", prefix="v*, ")]
    reach = max(0.1, 1.2 * float(last[["cosine_token", "cosine_sequence"]].abs().max().max()))
    axes.set_ylim(-min(reach, 1.05), min(reach, 1.05))
    axes.set_ylabel("mean cosine")
    finish_sites(axes, sites, labels, room=0.27)
    return f"v* and a pair’s v have a mean cosine of {extremes(sites, last['cosine_token'], '.3f')}"


def _curves(axes: Axes, last: pd.DataFrame, column: str, *, prefix: str = "") -> list[EndLabel]:
    """One curve a kind of direction, with its interval where it has one; returns their labels."""
    curves = []
    for kind, name in _NAMES.items():
        values = column.format(kind)
        if f"{values}_low" in last and last[f"{values}_low"].notna().any():
            low, high = last[f"{values}_low"], last[f"{values}_high"]
            shade_sites(axes, last["site"].tolist(), low, high, colour=_COLOURS[kind])
        curves.append(Curve(values, prefix + name, _STYLES[kind], _COLOURS[kind]))
    return plot_curves(axes, last, curves)


def _interval(last: pd.DataFrame) -> str:
    site = deepest(last["site"].tolist())
    row = last[last["site"] == site].iloc[0]
    change, low, high = (as_text(float(row[f"token_delta{end}"]), "+.2f") for end in ("", "_low", "_high"))
    return f"Mean change at {site_name(site)}: {change}, 95 % CI {low} … {high}, prompts resampled, base and policy paired."


def _reading(share_preferred: float) -> list[str]:
    lines = [
        "v = e(chosen) − e(rejected): unembeddings of the first tokens in which a pair’s responses differ; v̄: of the mean tokens "
        "of whole responses. Both are each pair’s own. h is read where that first token is predicted.",
        "Bands: 95 % intervals by resampling prompts, base and policy paired.",
        "Only at the final norm’s output (diamond) is v a difference of logits.",
        "v* is the mean change of h, at the same token. v* and v are different things, hence the last panel; chance is 0, about "
        "±1/√d for one pair.",
    ]
    if share_preferred == share_preferred:
        share = as_text(share_preferred, "percent")
        lines.append(f"On the preferred side of the base model’s hyperplane H_v: {share} of the pairs.")
    return lines


def _headlines(last: pd.DataFrame) -> list[Headline]:
    site = deepest(last["site"].tolist())
    row = last[last["site"] == site].iloc[0]
    if row["token_share_grown"] != row["token_share_grown"]:
        return []
    where = f"{site_name(site)}, {after_steps(row['steps_taken'])}; projection.csv, column token_share_grown. ½ is no change."
    return [Headline(as_text(float(row["token_share_grown"]), "percent"), "of pairs moved along v", where)]


def preference_plane_tables(seen: Observed) -> Tables | None:
    """``preference_plane``: each pair's step; ``projections``: every pair and site; ``preference_plane_about``: means, shares."""
    if (found := parting(seen)) is None:
        return None
    rows, v, said = found
    where = {"snapshot": rows.name, "position": rows.points[-1].position, "pair_id": rows.ids_of(rows.points[-1])}
    parts = []
    for point in rows.points:
        change = {name: x.numpy() for name, x in projection_change(*rows.rows(point), v)._asdict().items()}
        parts.append(pd.DataFrame(where | {"site": point.site} | change))
    point = rows.points[-1]
    at, shares = plane_points(rows, point, v)
    summary = summarize_projections(projection_change(*rows.rows(point), v), rows.clusters_of(point))
    said = said.assign(**summary.change.named("change"), **summary.share_grown.named("share_grown"))
    said = said.assign(**{f"energy_{axis}": share for axis, share in zip(_AXES, shares, strict=True)})
    return {
        "preference_plane": pd.DataFrame(where | {"site": point.site} | at),
        "projections": pd.concat(parts, ignore_index=True),
        "preference_plane_about": said,
    }


def parting(seen: Observed) -> tuple[StatePair, Float[Tensor, "row d_model"], pd.DataFrame] | None:
    """Rows whose state predicts the first tokens in which a pair's responses differ, v = e_w − e_l of each, and what they are.

    Rows read at ``diverge`` can all be used. Of rows read at ``prompt_last`` those can whose responses differ in their very
    first token: the state there is the one that predicts it. None where tokens or unembedding are not known, or no four rows
    can be used.

    Raises:
        UserError: a file is damaged; names it.
    """
    rows = seen.at("diverge") or seen.at()
    position = None if rows is None else rows.positions[0]
    if rows is None or not rows.tokens or position not in (DIVERGE, USUAL_POSITION):
        return None
    words: dict[int, tuple[int, int]] = {}
    for i in rows.policy[rows.points[0]].pair_index.tolist():
        _, chosen, rejected = cut_pair(rows.tokens[i], ["diverge"])
        if chosen[-1] != rejected[-1] and (position == DIVERGE or len(chosen) == 1):
            words[i] = chosen[-1], rejected[-1]
    d_model = rows.update(rows.points[0]).shape[1]
    found = seen.read_unembedding([*chain.from_iterable(words.values())], d_model) if len(words) >= 4 else None
    if found is None:
        return None
    e, model = found
    said = about(rows, rows.points[-1:]).assign(n_kept=len(words), d_model=d_model, model=model)
    return rows.of_pairs(torch.tensor(sorted(words))), e[0::2] - e[1::2], said


def plane_points(
    rows: StatePair, point: ReadPoint, v: Float[Tensor, "row d_model"]
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Along each pair's own v, and the first two principal components of h less its part along v, of base and policy together.

    Returns:
        ``base_v`` … ``policy_pc2``; and the shares of the update's squared norm along the three axes.
    """
    base, policy = (found.double() for found in rows.rows(point))
    unit = v.double() / v.double().norm(dim=1, keepdim=True)
    along = [(h * unit).sum(1, keepdim=True) for h in (base, policy)]
    rest = [h - part * unit for h, part in zip((base, policy), along, strict=True)]
    both = torch.cat(rest)
    directions = principal_directions(both, 2, centred=True).directions
    at = [torch.cat([a, (r - both.mean(0)) @ directions.T], dim=1) for a, r in zip(along, rest, strict=True)]
    shares = ((at[1] - at[0]).square().sum(0) / (policy - base).square().sum()).tolist()
    named = zip(("base", "policy"), at, strict=True)
    return {f"{of}_{axis}": x[:, i].numpy() for of, x in named for i, axis in enumerate(_AXES)}, shares


def draw_preference_plane(tables: Tables) -> Section:
    """The section of what :func:`preference_plane_tables` made."""
    table, said = tables["preference_plane"], tables["preference_plane_about"]
    here = said.iloc[0]
    change, least, most = (as_text(here[f"change{end}"], "+.2f") for end in ("", "_low", "_high"))
    said_of = {1: said_of_growth(here), 2: said_of_shares(here)}
    panels = [partial(draw_steps, component=i, sentence=sentence) for i, sentence in said_of.items()]
    figure, sentences = draw_panels(panels, table, panel_height_cm=6.6)
    return Section(
        name="preference_plane",
        question="Where do hidden states move, seen along the preference?",
        claim="D-STEER, Fig. 1a: hidden states move along the preference vector v, pair by pair.",
        sentences=sentences,
        interval=f"Mean change at {site_name(here['site'])}: {change}, 95 % CI {least} … {most}, prompts resampled, base and "
        "policy paired.",
        limits=[
            "Anything but what was trained: DPO’s loss asks for ⟨h, v⟩ to grow at the final norm’s output.",
            "The rest of the space, which two components hide. Each pair is drawn on another v: arrows side by side need not be "
            "parallel in truth.",
            "What shuffled labels or SFT do, and whether the step causes what is written.",
        ],
        figure=figure,
        table=table,
        reading=_plane_reading(said),
        more_tables={name: tables[name] for name in ("projections", "preference_plane_about")},
    )


def draw_steps(axes: Axes, table: pd.DataFrame, component: int, sentence: str) -> str:
    """An arrow a pair from base to policy, and the mean step; returns the sentence."""
    base, policy = (table[[f"{of}_v", f"{of}_pc{component}"]].to_numpy() for of in ("base", "policy"))
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


def said_of_growth(here: pd.Series) -> str:
    """In how many pairs the projection grew, and by how much on average."""
    share, low, high = (as_text(here[f"share_grown{end}"], "percent") for end in ("", "_low", "_high"))
    change, least, most = (as_text(here[f"change{end}"], "+.2f") for end in ("", "_low", "_high"))
    return (
        f"⟨h, v⟩ grew in {share} of the pairs at {site_name(here['site'])} (95\u00a0% CI {low} … {high}); its mean change is "
        f"{change} ({least} … {most})"
    )


def said_of_shares(here: pd.Series) -> str:
    """A sentence on the share of the update along each axis."""
    v, first, second = (as_text(100 * here[f"energy_{axis}"], ".1f") + "\u00a0%" for axis in _AXES)
    chance = as_text(100 / here["d_model"], ".1f") + "\u00a0%"
    return (
        f"Of the update’s energy {v} lies along v (a random direction: {chance}), {first} along PC1 and {second} along PC2 "
        "of the rest"
    )


def _plane_reading(said: pd.DataFrame) -> list[str]:
    here = said.iloc[0]
    lines = [
        "v = e(chosen) − e(rejected): unembeddings of the first tokens in which a pair’s responses differ, each pair’s own; "
        f"h is the state that predicts them. Unembedding: of {here['model']}/.",
        f"An arrow is one pair at {site_name(here['site'])}, from base to {here['snapshot']}. PC1, PC2: principal components of h "
        "without its part along v, of base and policy together, less their mean.",
        "Intervals: prompts resampled, base and policy paired. projections.csv has every pair at every site.",
    ]
    if here["n_kept"] < here["n_rows"]:
        lines.insert(
            1,
            f"{here['n_kept']} of {here['n_rows']} rows: states were stored at {here['position']}, which is that state only where "
            f"the very first tokens differ. callbacks=full stores {DIVERGE} for all pairs.",
        )
    return [*lines, *row_notes(said)]
