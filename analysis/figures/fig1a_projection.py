"""Do hidden states move along what the preference asks for? Projections onto v and v̄ at every site, last observation."""

import pandas as pd
from matplotlib.axes import Axes

from analysis.open.observations import DIVERGE, after_steps, deepest, latest, site_name
from analysis.report.page import Headline, Section
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
)
from analysis.report.style import COLOURS, EndLabel, mark_level
from tiltmeter.metric_names import metric

_INTERVALS = ("delta", "share_grown")
DIRECTIONS = {"token": "projection", "sequence": "projection_sequence"}
"""Kind of direction, v of the first differing tokens or v̄ of whole responses → family in metrics.csv."""
_NAMES = {"token": "v", "sequence": "v̄"}
_STYLES = {"token": "-", "sequence": "--"}
_COLOURS = {"token": COLOURS["policy_dark"], "sequence": COLOURS["policy"]}
_GREY = COLOURS["mark"]
HYPERPLANE = metric("hyperplane", "share_preferred")


def projection_section(table: pd.DataFrame, metrics: pd.DataFrame) -> Section | None:
    """The section ``projection``.

    Args:
        table: :func:`analysis.open.observations.observed`.
        metrics: metrics.csv, for what isn't of one site.
    """
    last = projection_table(table)
    if last["token_delta"].isna().all():
        return None
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
        reading=_reading(last, metrics),
        headlines=_headlines(last),
    )


def projection_table(table: pd.DataFrame) -> pd.DataFrame:
    """The last observation after a step: projections, changes and shares with their 95 % intervals, and cos(v*, ·)."""
    names: dict[str, str] = {}
    for kind, family in DIRECTIONS.items():
        names |= {f"{kind}_{what}": metric(family, what) for what in ("base", "policy")}
        names |= {
            f"{kind}_{what}{end}": metric(family, f"{what}{end}")
            for what in _INTERVALS
            for end in ("", "_low", "_high")
        }
        names[f"cosine_{kind}"] = metric("direction_cosine", kind)
    there = table.reindex(columns=["steps_taken", "position", "site", *names.values()])
    changed = there[(there["position"] == DIVERGE) & there[names["token_delta"]].notna()]
    return latest(changed).set_axis(["steps_taken", "position", "site", *names], axis=1)


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


def _reading(last: pd.DataFrame, metrics: pd.DataFrame) -> list[str]:
    lines = [
        "v = e(chosen) − e(rejected): unembeddings of the first tokens in which a pair’s responses differ; v̄: of the mean tokens "
        "of whole responses. Both are each pair’s own. h is read where that first token is predicted.",
        "Bands: 95 % intervals by resampling prompts, base and policy paired.",
        "Only at the final norm’s output (diamond) is v a difference of logits.",
        "v* is the mean change of h, at the same token. v* and v are different things, hence the last panel; chance is 0, about "
        "±1/√d for one pair.",
    ]
    if HYPERPLANE in metrics and metrics[HYPERPLANE].notna().any():
        share = as_text(float(metrics[HYPERPLANE].dropna().iloc[-1]), "percent")
        lines.append(f"On the preferred side of the base model’s hyperplane H_v: {share} of the pairs.")
    return lines


def _headlines(last: pd.DataFrame) -> list[Headline]:
    site = deepest(last["site"].tolist())
    row = last[last["site"] == site].iloc[0]
    if row["token_share_grown"] != row["token_share_grown"]:
        return []
    where = f"{site_name(site)}, {after_steps(row['steps_taken'])}; projection.csv, column token_share_grown. ½ is no change."
    return [Headline(as_text(float(row["token_share_grown"]), "percent"), "of pairs moved along v", where)]
