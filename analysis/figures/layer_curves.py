"""Is the update one constant shift, layer by layer, and more of one than random weight changes make? At the last observation."""

import pandas as pd
from matplotlib.axes import Axes

from analysis.controls.c08_random_weights import (
    MISSING,
    NOTE,
    difference,
    draw_random,
    draws_table,
    is_known,
    said_of_difference,
    verdict,
    with_random,
)
from analysis.open.observations import CONTENT, UPDATE, after_steps, deepest, latest, named, site_name, updates
from analysis.open.observed import Observed, Tables
from analysis.report.page import Headline, Section
from analysis.report.site_axes import (
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
    span,
)
from analysis.report.style import COLOURS, EndLabel
from tiltmeter.metric_names import metric
from tiltmeter.weights.random_update import RandomUpdates

NULLS = {
    "shift_share_null_high": metric("shift_share", "null_high"),
    "mean_cosine_in_sample_null_high": metric("mean_cosine", "in_sample_null_high"),
    "mean_cosine_leave_one_out_null_high": metric("mean_cosine", "leave_one_out_null_high"),
}
"""Upper ends of null bands: column of the table → name in metrics.csv, without the site."""
_F, _RHO, _COS = "shift_share", "top1_energy", "mean_cosine_leave_one_out"
BESIDE = (_F, _RHO, f"{_RHO}_centred", "sigma_ratio", "mean_cosine_in_sample", _COS)
"""Columns beside the same under random weights, of the base's own states and at a content token."""
SHOWN = {
    _F: ("f", "{:.3f}"),
    f"{_F}_random": ("f random", "{:.3f}"),
    f"{_F}_base": ("f base", "{:.3f}"),
    f"{_F}_content": ("f content", "{:.3f}"),
    f"{_F}_content_random": ("f content, random", "{:.3f}"),
    _RHO: ("ρ₁", "{:.3f}"),
    f"{_RHO}_random": ("ρ₁ random", "{:.3f}"),
    f"{_RHO}_centred": ("ρ₁ centred", "{:.3f}"),
    f"{_RHO}_centred_random": ("ρ₁ centred, random", "{:.3f}"),
    "sigma_ratio": ("σ₂/σ₁", "{:.2f}"),
    "sigma_ratio_random": ("σ₂/σ₁ random", "{:.2f}"),
    "mean_cosine_in_sample": ("cos in-sample", "{:.3f}"),
    _COS: ("cos leave-one-out", "{:.3f}"),
    f"{_COS}_random": ("cos l-o-o, random", "{:.3f}"),
    f"{_COS}_base": ("cos l-o-o, base", "{:.3f}"),
    f"{_COS}_content": ("cos l-o-o, content", "{:.3f}"),
    "entropy_energy": ("H energy", "{:.2f}"),
    "entropy_energy_centred": ("H energy, centred", "{:.2f}"),
}
"""Columns of the table as people read them: heading and format."""
_BLUE, _NAVY, _GREY, _BASE = COLOURS["policy"], COLOURS["policy_dark"], COLOURS["mark"], COLOURS["base"]


def geometry_tables(seen: Observed) -> Tables | None:
    """``geometry``: as last observed, a row a site; ``random_update``: every draw of random weights, where there are any."""
    last = geometry_table(seen.table, seen.random)
    if last[[_F, f"{_RHO}_centred", _COS]].isna().all(axis=None):
        return None
    return {"geometry": last} | ({} if seen.random is None else {"random_update": draws_table(seen.random)})


def draw_geometry(tables: Tables) -> Section:
    """Shares and cosines by layer beside those of random weights, of what :func:`geometry_tables` made."""
    last = tables["geometry"]
    panels: list[Panel] = []
    if last[_F].notna().any():
        panels.append(draw_shares)
    if last[f"{_RHO}_centred"].notna().any():
        panels.append(draw_rest)
    if last[_COS].notna().any():
        panels.append(draw_cosines)
    figure, sentences = draw_over_sites(panels, last, panel_height_cm=6.6)
    return Section(
        name="geometry",
        question="Is what training did to hidden states one constant shift, and more so than random weights?",
        claim="D-STEER: DPO moves all hidden states along one shared direction, whatever the prompt.",
        sentences=sentences,
        interval="Of the difference: the 95 % prediction interval of one more random draw decides; columns …_random_expected "
        "of the table. Section clouds has the 95 % interval of f over prompts, section consistency that of the cosine.",
        limits=[
            "Whether the shift is preference: SFT or shuffled labels may shift as much, which is for control runs to say.",
            "Whether a few dimensions of large activations pass for a shift; sections entropy_controls and singular_values leave "
            "them out.",
            "More than one fact: ρ₁ ≥ f always, and with rows of equal length f is the square of the mean cosine. Centred ρ₁ is "
            "another.",
        ],
        figure=figure,
        table=last,
        shown=shown_table(last),
        reading=_reading(last, tables.get("random_update")),
        headlines=_headlines(last),
        more_tables={name: table for name, table in tables.items() if name == "random_update"},
    )


def geometry_table(table: pd.DataFrame, random: RandomUpdates | None = None) -> pd.DataFrame:
    """The last observation: a row for each site, in the order of the forward pass; empty columns where nothing was logged.

    ``…_base``: of the base's own states; ``…_content``: at a content token; ``…_random``: see
    :func:`analysis.controls.c08_random_weights.with_random`.
    """
    last = latest(updates(table))
    position = str(last["position"].iloc[0]) if len(last) else ""
    found = with_random(_columns(last, UPDATE | NULLS), random, position, BESIDE)
    there = latest(updates(table, CONTENT)) if position != CONTENT else last.iloc[:0]
    is_of_last = last["steps_taken"].isna().all() or set(there["steps_taken"]) == set(last["steps_taken"])
    there = there if is_of_last else there.iloc[:0]
    content = with_random(_columns(there, {name: UPDATE[name] for name in BESIDE}), random, CONTENT, BESIDE)
    base = {f"{name}_base": named("base")[name] for name in BESIDE}
    found, content = (part.join(_columns(rows, base)[[*base]]) for part, rows in ((found, last), (content, there)))
    content = content.drop(columns=["steps_taken", "position"]).set_index("site").rename(columns=_content_name)
    return found.join(content, on="site")


def _content_name(column: str) -> str:
    """``shift_share_random`` → ``shift_share_content_random``."""
    figure = max((name for name in BESIDE if column.startswith(name)), key=len)
    return f"{figure}_content{column.removeprefix(figure)}"


def _columns(rows: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    """The readings under the names of the table."""
    where = ["steps_taken", "position", "site"]
    found = rows.reindex(columns=[*where, *names.values()]).reset_index(drop=True)
    return found.set_axis([*where, *names], axis=1)


def shown_table(last: pd.DataFrame) -> pd.DataFrame:
    """The table as text, for the page and the terminal; – where nothing was logged; columns without a number are left out."""
    shown = {"site": last["site"].tolist()}
    for column, (heading, form) in SHOWN.items():
        if last[column].notna().any():
            shown[heading] = ["–" if x != x else form.format(x).replace("-", "−") for x in last[column]]
    return pd.DataFrame(shown)


def draw_shares(axes: Axes, last: pd.DataFrame) -> str:
    """f beside that of random weights, of the base's own states, and of content tokens."""
    sites = last["site"].tolist()
    prepare_sites(axes, sites)
    labels = []
    if last["shift_share_null_high"].notna().any():
        shade_sites(axes, sites, 0.0, last["shift_share_null_high"])
        labels.append(EndLabel(last_value(last["shift_share_null_high"]) / 2, "signs flipped", _GREY))
    labels += draw_random(axes, last, _F)
    labels += draw_random(axes, last, f"{_F}_content", name="random, content", style=":")
    curves = [
        Curve(f"{_F}_base", "base’s states", "--", _BASE),
        Curve(f"{_F}_content", "f, content", "--", _BLUE),
        Curve(_F, "f", "-", _NAVY),
    ]
    labels += plot_curves(axes, last, curves)
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("f: share of one constant row")
    finish_sites(axes, sites, labels, room=0.33)
    return _said(
        last, _F, "f", "percent", f"One constant shift is {extremes(sites, last[_F], 'percent')} of the update"
    )


def draw_rest(axes: Axes, last: pd.DataFrame) -> str:
    """ρ₁ raw and centred, each beside that of random weights."""
    sites = last["site"].tolist()
    prepare_sites(axes, sites)
    labels = draw_random(axes, last, _RHO, style=":")
    labels += draw_random(axes, last, f"{_RHO}_centred", name="random, centred")
    curves = [Curve(_RHO, "ρ₁", ":", _BLUE), Curve(f"{_RHO}_centred", "ρ₁ centred", "-", _NAVY)]
    labels += plot_curves(axes, last, curves)
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("share of ΔH’s energy")
    finish_sites(axes, sites, labels, room=0.33)
    column = f"{_RHO}_centred"
    said = f"Without the shift, one direction holds at most {as_text(last[column].max(), 'percent')} of the update"
    if not is_known(last, column):
        return said
    return f"{said}; under random weights {as_text(last[f'{column}_random'].max(), 'percent')}"


def draw_cosines(axes: Axes, last: pd.DataFrame) -> str:
    """Mean cosine with v*, leave-one-out, beside that of random weights, of the base's own states, and of content tokens."""
    sites = last["site"].tolist()
    prepare_sites(axes, sites)
    labels = []
    if last[f"{_COS}_null_high"].notna().any():
        shade_sites(axes, sites, 0.0, last[f"{_COS}_null_high"])
        labels.append(EndLabel(last_value(last[f"{_COS}_null_high"]) / 2, "signs flipped", _GREY))
    labels += draw_random(axes, last, _COS)
    labels += draw_random(axes, last, f"{_COS}_content", name="random, content", style=":")
    curves = [
        Curve(f"{_COS}_base", "base’s states", "--", _BASE),
        Curve(f"{_COS}_content", "content", "--", _BLUE),
        Curve(_COS, "ΔH", "-", _NAVY),
    ]
    labels += plot_curves(axes, last, curves)
    axes.set_ylim(min(0.0, float(last[_COS].min()) - 0.03), 1.03)
    axes.set_ylabel("mean cosine with v*,\nleave-one-out")
    finish_sites(axes, sites, labels, room=0.33)
    alone = f"Leave-one-out, the mean cosine with v* is {extremes(sites, last[_COS], '.3f')}"
    known = (last[_COS].notna() & last[f"{_COS}_null_high"].notna()).sum()
    n_above = int((last[_COS] > last[f"{_COS}_null_high"]).sum())
    alone += f", above its null at {n_above} of {known} sites" if known else ""
    return _said(last, _COS, "The mean cosine with v*", ".2f", alone)


def _said(last: pd.DataFrame, column: str, what: str, form: str, alone: str) -> str:
    """The difference to random weights, the figures behind it and those at a content token; without draws, the figure."""
    content, base = last[f"{column}_content"], last[f"{column}_base"]
    if not is_known(last, column):
        there = f"; at a content token {span(content, form)}" if content.notna().any() else ""
        return f"{alone}{there}; {MISSING}"
    said = f"{said_of_difference(last, column, what)} (itself {span(last[column], form)}"
    if base.notna().any():
        said += f", the base’s own states {span(base, form)}"
    if content.notna().any():
        said += f"; at a content token {span(content, form)}, random {span(last[f'{column}_content_random'], form)}"
    return f"{said})"


def _reading(last: pd.DataFrame, draws: pd.DataFrame | None) -> list[str]:
    """Notes on how to read the figure, and what it does not show."""
    position, steps = last["position"].iloc[0], last["steps_taken"].iloc[0]
    lines = [
        f"ΔH holds the change of each probe pair’s hidden state at {position}, policy less base, {after_steps(steps)}; v* is its "
        "mean row. Diamond: the final norm’s output, on a scale of its own.",
        "f = N‖v*‖²/‖ΔH‖²: share of ΔH that is one constant row. ρ₁: share along its first direction; centred: of what is left "
        "without the mean row.",
        "At prompt_last all prompts of a template end in the same tokens, whose states any change of the weights moves alike. So f "
        "stands beside f under random weights, f of the base’s own states, and f at a content token: one token of each prompt, "
        "drawn among those that fewer than 95 % of the prompts hold.",
    ]
    if draws is None:
        lines.append(f"Here {MISSING}; python analyze.py makes up for it where the models can be opened.")
    else:
        n = draws.loc[draws["form"] == "gaussian", "draw"].nunique()
        kept = f"{_F}_rotated"
        rotated = (
            f" With the update’s own singular values kept: f {span(last[kept], '.2f')}."
            if last[kept].notna().any()
            else ""
        )
        lines.append(f"{NOTE} {n} draws.{rotated}")
    lines.append(
        "In-sample, a row is part of its own mean, so noise alone gives about 1/√N; leave-one-out compares it with the others "
        "and has null 0."
    )
    if last["shift_share_null_high"].notna().any() or last[f"{_COS}_null_high"].notna().any():
        lines.append("Signs flipped: up to the 97.5 % quantile when each row’s sign is flipped at random.")
    return lines


def _headlines(last: pd.DataFrame) -> list[Headline]:
    site = deepest(last["site"].tolist())
    row = last[last["site"] == site]
    found = []
    for column, alone, name, form in (
        (_F, "of the update is one constant shift (f)", "f", "percent"),
        (_COS, "mean cosine with v*, leave-one-out", "mean cosine with v*", ".3f"),
    ):
        value = float(row[column].iloc[0])
        if value != value:
            continue
        where = f"{site_name(site)}, {after_steps(row['steps_taken'].iloc[0])}; geometry.csv, column {column}"
        if not is_known(row, column):
            found.append(Headline(as_text(value, form), alone, f"{where}. No control: {MISSING}."))
            continue
        less = as_text(float(difference(row, column).iloc[0]), "+.2f")
        beside = {
            "": "",
            "_random": "random weights ",
            "_base": "the base’s own states ",
            "_content": "at a content token ",
        }
        told = [
            f"{word}{as_text(float(row[column + end].iloc[0]), '.2f')}"
            for end, word in beside.items()
            if row[column + end].notna().any()
        ]
        told[0] = f"{name} {told[0]}"
        what = f"{name} less that of random weights of equal norm: {verdict(row, column)}"
        found.append(Headline(less, what, f"{', '.join(told)}; {where} and …_random."))
    return found
