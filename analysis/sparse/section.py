"""The section ``sparse_features``: usage by class, what is lost without a class, features used most, DPO's update in them."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FormatStrFormatter

from analysis.report.coloured import Coloured, Token
from analysis.report.page import Headline, Section
from analysis.report.site_axes import Panel, as_text, draw_panels
from analysis.report.style import COLOURS, EndLabel, label_ends, use_log_scale
from analysis.sparse.classes import ALIGNMENT, CLASSES, STYLE
from analysis.sparse.features import BOTH, NAME, FeatureTables
from datamodules.synthetic_phrases import ATTRIBUTES
from tiltmeter.judges.prompts import CLASSIFY_FEATURE, EXPLAIN_FEATURE

_CLASS_COLOURS = {STYLE: COLOURS["policy"], ALIGNMENT: COLOURS["policy_dark"], "other": COLOURS["mark"]}
_USED = {
    "features": "features", "activation": "activation", "effective_steering": "steering", "dpo_change": "DPO’s change",
}  # fmt: skip
_SHADES = ("less than 1 %", "1 … 3 %", "3 … 10 %", "10 … 30 %", "30 … 100 %")
"""Shares of the largest activation → the shades of :mod:`analysis.report.coloured`, whose steps are tenths of it."""


def sparse_features_section(found: FeatureTables) -> Section:
    """The section ``sparse_features``."""
    panels: list[Panel] = [lambda axes, _: _draw_usage(axes, found.features)]
    if len(found.ablations):
        panels += [lambda axes, _: _draw_ablations(axes, found.ablations), lambda axes, _: _draw_top(axes, found.top)]
    if found.bridge is not None:
        panels.append(lambda axes, _: _draw_explained(axes, found.bridge.explained))  # type: ignore[union-attr]
        if found.about["has_steering"]:
            panels.append(lambda axes, _: _draw_overlap(axes, found))
    figure, sentences = draw_panels(panels, found.features, panel_height_cm=4.8)
    more = {f"{NAME}_by_feature": found.features, f"{NAME}_prompts": _prompts()}
    if len(found.top):
        more[f"{NAME}_top"] = found.top
    if found.bridge is not None:
        more |= {f"{NAME}_explained": found.bridge.explained, f"{NAME}_steering": found.bridge.steered}
        if found.bridge.overlap is not None:
            more[f"{NAME}_overlap"] = pd.DataFrame([found.bridge.overlap._asdict()])
    return Section(
        name=NAME,
        question="In which sparse features is the preference, and does DPO move the same ones?",
        claim="FSRL (arXiv 2509.12934): a preference is learned by steering style features; alignment features matter little.",
        sentences=sentences,
        interval="95\u00a0%, over prompts, by the jackknife; of random sets, the interval that a further one lies in.",
        limits=_limits(found),
        figure=figure,
        table=found.ablations if len(found.ablations) else found.features,
        reading=_reading(found),
        headlines=_headlines(found),
        shown=_shown(found),
        caption="Sets of features that are no longer steered, beside random ones"
        if len(found.ablations)
        else "What features hold of DPO’s update",
        more_tables=more,
        coloured=_coloured(found),
    )


def _limits(found: FeatureTables) -> list[str]:
    error = found.about["label_error"]
    known = "not known" if error != error else as_text(error, "percent")
    return [
        f"Whether a label is right: classes by {found.about['classes']}; probability that one is wrong: {known}.",
        "What the autoencoder doesn’t hold of a state is never steered, and no feature of it is counted.",
        "Other autoencoders of the same states: another seed finds other features.",
    ]


def _reading(found: FeatureTables) -> list[str]:
    said = [
        f"Autoencoder: {found.about['sae']}. {found.about['n_tokens']} response tokens of held-out pairs; usage of a feature is "
        "the mean |ReLU(f + s) − f| over them: a negative s on a feature that is off does nothing.",
    ]
    if len(found.ablations):
        said += [
            f"Loss: the run’s own ({found.about['loss']}) on {found.about['n_pairs']} held-out pairs. A class is ablated by s = 0 "
            "for its features at every token. Dark bar: random sets of features that are used as much in total, drawn of all; "
            "light bar: as many.",
            "In brackets: the weight of an attribute in the planted preference, where one is known.",
            "Under wrong labels: the range of the rise when each label is drawn anew with the probability that it is wrong "
            "(columns relabelled_…).",
        ]
    if found.bridge is not None:
        said.append(
            "Explained: 1 − ‖δ − Δf_S W_dec‖² ÷ ‖δ‖², with DPO’s change Δf of the features of a set S; below 0, their part leads "
            "further from the update than nothing. Rank correlation: beside features exchanged with others as often active."
        )
    return said


def _headlines(found: FeatureTables) -> list[Headline]:
    if not len(found.ablations):
        return []
    style = _row(found.ablations, STYLE)
    match = f"beside features used as much: {_with_ends(style, 'above_usage_matched') or 'no number'}, {style['verdict_usage']}"
    return [
        Headline(
            as_text(style["rise"], "+.3f"),
            "more preference loss when style features are no longer steered",
            f"alignment features: {as_text(_row(found.ablations, ALIGNMENT)['rise'], '+.3f')}; {match}. {NAME}.csv, column rise.",
        )
    ]


def _row(table: pd.DataFrame, name: str) -> "pd.Series[float]":
    return table[table["ablated"] == name].iloc[0]


def _prompts() -> pd.DataFrame:
    """Questions that a judge is asked, as they stand."""
    return pd.DataFrame(
        [{"name": of.id, "system": of.system, "user": of.user} for of in (EXPLAIN_FEATURE, CLASSIFY_FEATURE)]
    )


def _shown(found: FeatureTables) -> pd.DataFrame:
    if not len(found.ablations):
        assert found.bridge is not None
        said = found.bridge.explained
        return pd.DataFrame(
            {
                "features": said["n_features"], "of the update": [as_text(x, ".2f") for x in said["explained_update"]],
                "of v*": [as_text(x, ".2f") for x in said["explained_v_star"]],
            }
        )  # fmt: skip
    rows = [
        (
            row["ablated"],
            f"{row['n_used']} of {row['n_features']}",
            as_text(row["usage_share"], "percent"),
            _with_ends(row, "rise"),
            _with_ends(row, "above_usage_matched"),
            str(row["verdict_usage"]) if isinstance(row.get("verdict_usage"), str) else "",
        )
        for _, row in found.ablations.iterrows()
    ]
    return pd.DataFrame(
        rows, columns=["not steered", "features used", "usage", "rise of the loss", "above usage-matched", "verdict"]
    )


def _with_ends(row: "pd.Series[float]", name: str) -> str:
    if not isinstance(row.get(name), float) or math.isnan(row[name]):
        return ""
    value, low, high = (as_text(row[f"{name}{end}"], "+.3f") for end in ("", "_low", "_high"))
    return f"{value} ({low} … {high})"


def _coloured(found: FeatureTables) -> Coloured | None:
    if not found.coloured:
        return None
    legend = [Token(text, f"up{i}" if i else "", "") for i, text in enumerate(_SHADES)]
    how = (
        "The features used most, in the responses that each is most active in. Colour: a token’s activation as a share of the "
        "feature’s largest one in these texts. Numbers: tenths of it."
    )
    return Coloured("What are these features?", how, legend, found.coloured)


def _draw_usage(axes: Axes, features: pd.DataFrame) -> str:
    """Shares of the classes among features, activation, steering and DPO's change."""
    counted = features.assign(features=(features["activation"] > 0).astype(float))
    names = [name for name in _USED if name in counted]
    shares = {name: counted.groupby("label")[name].sum() / max(counted[name].sum(), 1e-30) for name in names}
    for i, name in enumerate(names):
        left = 0.0
        for label in (STYLE, ALIGNMENT, CLASSES[-1]):
            width = float(shares[name].get(label, 0.0))
            axes.barh(i, width, left=left, color=_CLASS_COLOURS[label], height=0.6)
            if width > 0.05:
                axes.text(left + width / 2, i, f"{width:.0%}", color="white", ha="center", va="center", fontsize=7)
            if i == 0:
                axes.text(
                    left + width / 2, -0.45, label, color=_CLASS_COLOURS[label], ha="center", va="bottom", fontsize=7
                )
            left += width
    axes.set_yticks(range(len(names)), [_USED[name] for name in names])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(names) - 0.6, -0.9)
    axes.set_xlabel("share of all features")
    main = "effective_steering" if "effective_steering" in shares else "dpo_change"
    style, alignment = (as_text(float(shares[main].get(label, 0.0)), "percent") for label in (STYLE, ALIGNMENT))
    what = "the steering" if main == "effective_steering" else "DPO’s change of features"
    return f"Of {what} {style} is on style features, {alignment} on alignment features"


def _draw_ablations(axes: Axes, table: pd.DataFrame) -> str:
    """Rise of the loss by set, beside random sets."""
    planted = table[table["ablated"].isin(ATTRIBUTES)].sort_values("planted_weight")
    rows = pd.concat([planted, table[table["ablated"].isin([ALIGNMENT, STYLE, BOTH])]])
    for i, (_, row) in enumerate(rows.iterrows()):
        for kind, shift, colour in (("usage", -0.16, COLOURS["mark"]), ("size", -0.32, COLOURS["null"])):
            axes.hlines(i + shift, row[f"random_{kind}_low"], row[f"random_{kind}_high"], color=colour, linewidth=4)
        axes.hlines(i, row["rise_low"], row["rise_high"], color=COLOURS["policy"], linewidth=1.2)
        axes.plot(row["rise"], i, "o", color=COLOURS["policy"], markersize=4)
    names = [
        name if math.isnan(weight) else f"{name} ({as_text(weight, '.2f')})"
        for name, weight in zip(rows["ablated"], rows["planted_weight"], strict=True)
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(-0.6, len(rows) - 0.5)
    axes.axvline(0, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlabel("rise of the preference loss")
    axes.set_ylabel("not steered")
    style, alignment = (as_text(_row(table, name)["rise"], ".3f") for name in (STYLE, ALIGNMENT))
    return f"Without style features the loss rises by {style}, without alignment features by {alignment}"


def _draw_top(axes: Axes, table: pd.DataFrame) -> str:
    """Share of the gain that the features used most keep."""
    rows = table[(table["share"] > 0) & (table["share"] < 1)]
    x = 100 * rows["share"]
    axes.fill_between(x, rows["random_low"], rows["random_high"], color=COLOURS["null"], alpha=0.4, linewidth=0)
    axes.fill_between(x, rows["kept_low"], rows["kept_high"], color=COLOURS["policy"], alpha=0.2, linewidth=0)
    axes.plot(x, rows["kept"], "o-", color=COLOURS["policy"], markersize=3)
    axes.plot(x, rows["without"], "s-", color=COLOURS["policy_dark"], markersize=3)
    axes.set_xscale("log")
    axes.set_xticks(list(x), [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.set_xlim(x.min() / 1.1, x.max() * 1.1)
    axes.set_xlabel("features used most, % of those used")
    axes.set_ylabel("share of the gain in loss")
    last = rows.iloc[-1]
    labels = [
        EndLabel(last["kept"], "these alone", COLOURS["policy"]),
        EndLabel(last["without"], "without these", COLOURS["policy_dark"]),
        EndLabel((last["random_low"] + last["random_high"]) / 2, "random", COLOURS["mark"]),
    ]
    label_ends(axes, [label for label in labels if math.isfinite(label.y)])
    tenth = rows[rows["share"] == 0.1].iloc[0]
    return f"A tenth of the features keeps {as_text(tenth['kept'], 'percent')} of what steering gains"


def _draw_explained(axes: Axes, table: pd.DataFrame) -> str:
    """Share of DPO's update and of v* by the number of features."""
    labels = []
    for order, colour, name in (
        ("dpo", COLOURS["policy"], "DPO’s first"),
        ("fsrl", COLOURS["policy_dark"], "FSRL’s first"),
    ):
        rows = table[table["order"] == order]
        if not len(rows):
            continue
        axes.plot(rows["n_features"], rows["explained_update"], "o-", color=colour, markersize=3)
        axes.plot(rows["n_features"], rows["explained_v_star"], "s--", color=colour, markersize=3)
        labels += [
            EndLabel(rows[column].iloc[-1], f"{what}, {name}", colour)
            for column, what in (("explained_update", "δ"), ("explained_v_star", "v*"))
        ]
    axes.set_xscale("log", base=2)
    ticks = sorted(set(table["n_features"]))[::3]
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    lowest = float(np.nanmin(table[["explained_update", "explained_v_star"]].to_numpy()))
    axes.set_ylim(max(-1.0, min(0.0, lowest) - 0.05), 1.02)
    axes.set_xlabel("features")
    axes.set_ylabel("share explained")
    label_ends(axes, labels, room=0.34)
    rows = table[table["order"] == "dpo"]
    at = rows[rows["n_features"] == 16].iloc[0] if (rows["n_features"] == 16).any() else rows.iloc[-1]
    return (
        f"The {int(at['n_features'])} features that DPO moves most hold {as_text(at['explained_update'], 'percent')} of its update "
        f"and {as_text(at['explained_v_star'], 'percent')} of v*, all {as_text(rows['explained_v_star'].iloc[-1], 'percent')} of v*"
    )


def _draw_overlap(axes: Axes, found: FeatureTables) -> str:
    """Usage of each feature by both methods."""
    assert found.bridge is not None
    assert found.bridge.overlap is not None
    table, overlap = found.features, found.bridge.overlap
    x, y = table["dpo_change"].to_numpy(), table["effective_steering"].to_numpy()
    least = [max(float(v[v > 0].min()), float(v.max()) * 1e-5) if (v > 0).any() else 1e-6 for v in (x, y)]
    for label in CLASSES[::-1]:
        of = (table["label"] == label).to_numpy()
        shown = np.maximum(x[of], least[0]), np.maximum(y[of], least[1])
        axes.plot(*shown, "o", color=_CLASS_COLOURS[label], markersize=2.5, alpha=0.7, label=label)
    use_log_scale(axes)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_xlabel("mean |Δf| by DPO")
    axes.set_ylabel("mean |Δf| by the steering")
    axes.legend(frameon=False, fontsize=7, markerscale=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    p_value = as_text(overlap.p_value, ".3f")
    return (
        f"Features that DPO moves and that the steering uses: rank correlation {as_text(overlap.value, '.2f')}, by density alone "
        f"{as_text(overlap.null_mean, '.2f')} (p = {p_value})"
    )
