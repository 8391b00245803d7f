"""The section on neighbours: preference over distance from the base, behaviour and utility of every method, and their cost."""

import math
from collections.abc import Sequence
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from analysis.neighbours.methods import BEST_OF, BIAS, CFGRL, DPO, GUIDED_AT, LINEAR, NAME, PROMPT, VECTOR
from analysis.report.page import Headline, Section
from analysis.report.site_axes import Panel, as_text, draw_panels
from analysis.report.style import COLOURS, mark_level

_CURVES = {
    CFGRL: ("guided by aligned", "policy_light"),
    LINEAR: ("guided by prompt", "chosen"),
    VECTOR: ("v*", "rejected"),
    BIAS: ("bias of logits", "null"),
}
"""Methods of several strengths → their name and colour; the strength 1 of the first is dpo, of the second the prompt."""
_AT_ONE = {CFGRL: DPO, LINEAR: PROMPT}
_FARTHEST = 4.0
"""Times dpo's distance from the base, up to which methods are drawn; the table has all."""
_NAMES = {DPO: "dpo", PROMPT: "prompt alone", BEST_OF: "best of n"} | {
    name: said for name, (said, _) in _CURVES.items()
}


def neighbours_section(found: tuple[pd.DataFrame, pd.DataFrame]) -> Section:
    """The section ``neighbours``; its table is methods.csv.

    Args:
        found: :meth:`analysis.neighbours.methods.Neighbours.table`.
    """
    table, prompts = found
    measured = table[table["preference_gained"].notna()] if "preference_gained" in table else table.iloc[:0]
    rows = [name for name in ("behaviour", "loss_neutral") if name in table and table[name].notna().any()]
    panels: list[Panel] = [_draw_distance, *(partial(_draw_rows, what=name) for name in rows)]
    figure, sentences = draw_panels(panels, table, panel_height_cm=6.0)
    dpo = measured[measured["method"] == DPO].iloc[0]
    missing = table["missing"].dropna() if "missing" in table else pd.Series(dtype=str)
    return Section(
        name=NAME,
        question="What do other ways to the same preference gain, and what do they cost?",
        claim="DPO is one of several ways to tilt a base by a preference: guidance, a prompt, one vector, a bias of logits, the "
        "best of n draws. What it does is its own where they do not do it.",
        sentences=sentences,
        interval=f"95\u00a0%, over {int(dpo['n'])} test prompts, by the jackknife; of shares, Clopper–Pearson’s.",
        limits=[
            "Which method is better: each is asked at a few strengths, and trained ones at one learning rate.",
            "Preferences other than those of the test pairs; a prompt is the best of a short list.",
            "Speed: passes a token are counted, not timed.",
        ],
        figure=figure,
        table=table,
        reading=[
            "Preference gained: mean change of log [P(chosen) / P(rejected)] from the base, nats. Distance: KL(method ‖ base), a "
            "token of the chosen responses. A method on the left of another has gone less far; column gained_at_equal_kl is read "
            "where each is as far as dpo, straight between strengths over √KL, and empty where it never is.",
            "Guided: z₀ + w (z − z₀), with the logits z of the aligned model (CFGRL; w = 1 is dpo) or of the base behind the "
            f"prompt (linear alignment; w = 1 is the prompt alone). They speak at w = {GUIDED_AT:g}, v* at λ = 1.",
            "Bias of logits: the mean change of logits over the other half’s responses, the same at every token.",
            *_principles(prompts),
            *(f"Not measured, {row['method']}: {row['missing']}." for _, row in table.loc[missing.index].iterrows()),
        ],
        headlines=[_headline(measured, dpo)],
        shown=_shown(table),
        caption="Every method at every strength; parameters are numbers that were fitted, passes those that a token takes",
        more_tables={"methods": table, "methods_prompts": prompts},
    )


def _principles(prompts: pd.DataFrame) -> list[str]:
    if not len(prompts):
        return []
    best = prompts.loc[prompts["preference_gained"].idxmax()]
    gained = as_text(best["preference_gained"], "+.2f")
    said = f"Prompt: “{best['principle']}”, the best of {len(prompts)} on the other half ({gained} nats there)."
    return [f"{said} methods_prompts.csv has all."]


def _headline(measured: pd.DataFrame, dpo: pd.Series) -> Headline:
    others = measured[~measured["method"].isin([DPO, CFGRL]) & measured["share_of_dpo"].notna()]
    if others.empty:
        return Headline(
            as_text(dpo["preference_gained"], "+.2f"), "nats of preference odds that dpo gains", "methods.csv"
        )
    best = others.loc[others["share_of_dpo"].idxmax()]
    name = _NAMES.get(best["method"], best["method"])
    return Headline(
        as_text(best["share_of_dpo"], "percent"),
        f"of dpo’s gain in preference odds by the next method, {name} at {best['strength']:g}",
        f"{as_text(best['kl'], '.3f')} nats a token from the base, dpo {as_text(dpo['kl'], '.3f')}. methods.csv.",
    )


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    columns = {
        "preference_gained": ("preference, nats", "+.2f"),
        "share_of_dpo": ("share of dpo’s", "percent"),
        "gained_at_equal_kl": ("at dpo’s KL", "+.2f"),
        "preference_loss": ("held-out loss", ".3f"),
        "accuracy": ("accuracy", "percent"),
        "behaviour": ("win rate", "percent"),
        "kl": ("KL", ".3f"),
        "loss_neutral": ("neutral loss", "+.3f"),
        "parameters": ("parameters", ",.0f"),
        "minutes": ("minutes", ".1f"),
        "passes": ("passes", ".0f"),
    }
    rows = []
    for _, row in table.iterrows():
        strength = "" if pd.isna(row.get("strength")) else f" {row['strength']:g}"
        said = {"method": f"{_NAMES.get(row['method'], row['method'])}{strength}"}
        for name, (title, form) in columns.items():
            value = row.get(name, math.nan)
            said[title] = "–" if pd.isna(value) else as_text(float(value), form)
        rows.append(said)
    return pd.DataFrame(rows)


def _draw_distance(axes: Axes, table: pd.DataFrame) -> str:
    rows = table[table["preference_gained"].notna()]
    for method, (name, colour) in _CURVES.items():
        own = rows[rows["method"].isin([method, _AT_ONE.get(method, method)])].sort_values("strength")
        if len(own):
            axes.plot(
                [0.0, *own["kl"]],
                [0.0, *own["preference_gained"]],
                "o-",
                color=COLOURS[colour],
                markersize=3,
                label=name,
            )
    known = {*_CURVES, *_AT_ONE.values()}
    for (_, row), mark in zip(rows[~rows["method"].isin(known)].iterrows(), "sD^vP*X" * 9, strict=False):
        axes.plot(row["kl"], row["preference_gained"], mark, color=COLOURS["mark"], markersize=4, label=row["method"])
    dpo = rows[rows["method"] == DPO].iloc[0]
    axes.plot(dpo["kl"], dpo["preference_gained"], "o", color=COLOURS["policy_dark"], markersize=5, label="dpo")
    mark_level(axes, 0.0)
    shown = rows[rows["kl"] <= _FARTHEST * dpo["kl"]]
    axes.set_xlim(-0.05 * shown["kl"].max(), 1.05 * shown["kl"].max())
    low, high = min(0.0, shown["preference_gained"].min()), shown["preference_gained"].max()
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_xlabel("KL from the base, nats a token")
    axes.set_ylabel("preference gained, nats")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=2)
    at_kl = rows.drop_duplicates("method").set_index("method")["gained_at_equal_kl"].dropna()
    said = [f"{_CURVES[name][0]} {as_text(at_kl[name], '+.1f')}" for name in (VECTOR, BIAS, LINEAR) if name in at_kl]
    start = f"dpo gains {as_text(dpo['preference_gained'], '+.1f')} nats of preference odds"
    return f"{start}; as far from the base {', '.join(said)}" if said else f"{start}; no other method goes as far"


def _draw_rows(axes: Axes, table: pd.DataFrame, *, what: str) -> str:
    """A figure of each method at the strength that it speaks at, with its interval."""
    speaking = {CFGRL: GUIDED_AT, LINEAR: GUIDED_AT}
    rows = table[table[what].notna()]
    rows = rows[
        [row["method"] == BEST_OF or row["strength"] == speaking.get(row["method"], 1.0) for _, row in rows.iterrows()]
    ]
    names: Sequence[str] = [_NAMES.get(name, name) for name in rows["method"]]
    at = range(len(rows))
    axes.hlines(at, rows[f"{what}_low"], rows[f"{what}_high"], colors=COLOURS["policy"], linewidth=0.8)
    axes.plot(rows[what], at, "o", color=COLOURS["policy"], markersize=3.5)
    axes.set_yticks(at, names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    is_rate = what == "behaviour"
    axes.axvline(0.5 if is_rate else 0.0, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlabel("win rate over the base" if is_rate else "neutral text: loss, nats a token")
    values = dict(zip(rows["method"], rows[what], strict=True))
    first, rest = values.get(DPO, math.nan), {name: value for name, value in values.items() if name != DPO}
    form = "percent" if is_rate else "+.3f"
    if not rest:
        return f"dpo: {as_text(first, form)}"
    best = max(rest, key=rest.__getitem__)
    other = f"{_NAMES.get(best, best)} {as_text(rest[best], form)}, the most of the others"
    if is_rate:
        return f"Judges prefer dpo’s answers to the base’s in {as_text(first, form)}; {other}"
    return f"Neutral text costs dpo {as_text(first, form)} nats a token more than the base; {other}"
