"""Are the policy's states arranged as the base's? CKA, RSA, neighbours, Procrustes and principal angles, and a map of sites.

Neighbours and displacement also after v* of the other prompts is taken off the policy's states; all else is of centred rows, in
which one shift of all states changes nothing, so that taking v* off can't either.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from analysis.controls.c08_random_weights import (
    MISSING,
    NOTE,
    draw_random,
    is_known,
    with_random,
)
from analysis.open.observations import CONTENT, deepest, site_name
from analysis.open.observed import Observed, Tables, about, row_notes
from analysis.report.page import Headline, Section
from analysis.report.site_axes import (
    SITES_LABEL,
    Curve,
    as_text,
    extremes,
    finish_sites,
    plot_curves,
    prepare_sites,
    shade_sites,
    shown_ticks,
    span,
    tick_name,
)
from analysis.report.style import COLOURS, EndLabel, house_style, mark_level, new_figure, set_titles
from tiltmeter.geometry.similarity import (
    LEAST_PROMPTS,
    cka_interval,
    cka_map,
    cka_of_grams,
    displacement,
    gram,
    nearest,
    neighbour_overlap,
    one_row_a_prompt,
    principal_angles,
    procrustes,
    rsa,
    u_centred,
    without_shift,
)
from tiltmeter.states.state_pair import StatePair
from tiltmeter.stats.among_random import BELOW, UNKNOWN
from tiltmeter.stats.equivalence import equivalence
from tiltmeter.stats.jackknife import COSINE, NO_INTERVAL

N_NEIGHBOURS, N_COMPONENTS = 10, 4
MARGIN = 0.05
"""Equivalent: CKA above one less this, by a one-sided test at 5 %."""
MOST_FOR_PAIRS = 512
"""Prompts, the first ones, of which RSA and Procrustes are told: their cost grows with the cube of the number."""
_MOST_NUMBERS = 60
"""Cells up to which their numbers are written into them."""
_BLUE, _NAVY, _GREY = COLOURS["policy"], COLOURS["policy_dark"], COLOURS["mark"]


def similarity_tables(seen: Observed) -> Tables | None:
    """``similarity``: a row for each position and site; ``similarity_map``: CKA of every two sites; ``similarity_about``."""
    if seen.states is None or seen.at() is None:
        return None
    rows = seen.states
    if len(set(rows.clusters_of(rows.points[0]))) < LEAST_PROMPTS:
        return None
    tables, maps = [], []
    for position in rows.positions:
        here = rows.at(position)
        found, of_map = of_position(here)
        tables.append(with_random(found, seen.random, position, ["cka"]))
        maps.append(of_map)
    return {
        "similarity": pd.concat(tables, ignore_index=True),
        "similarity_map": pd.concat(maps, ignore_index=True),
        "similarity_about": about(rows, rows.points),
    }


def of_position(rows: StatePair) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of both tables at the one position that is there; Gram matrices are made once for both."""
    found, kept = [], {"base": list[Tensor](), "policy": list[Tensor]()}
    for point in rows.points:
        clusters = rows.clusters_of(point)
        base, policy = (one_row_a_prompt(each, clusters) for each in rows.rows(point))
        of_base, of_policy = gram(base), gram(policy)
        where = {"snapshot": rows.name, "position": point.position, "site": point.site, "n_prompts": len(base)}
        found.append(where | likeness(base, policy, of_base, of_policy))
        for name, made in (("base", of_base), ("policy", of_policy)):
            kept[name].append(u_centred(made).float())
    sites = [point.site for point in rows.points]
    own, across = cka_map(kept["base"], kept["base"]), cka_map(kept["base"], kept["policy"])
    cells = [
        {"position": rows.points[0].position, "base_site": one, "policy_site": other}
        | {"cka": float(across[i, j]), "cka_of_base": float(own[i, j])}
        for i, one in enumerate(sites)
        for j, other in enumerate(sites)
    ]
    return pd.DataFrame(found), pd.DataFrame(cells)


def likeness(base: Tensor, policy: Tensor, of_base: Tensor, of_policy: Tensor) -> dict[str, object]:
    """Every measure of two clouds, one row a prompt, with intervals over prompts.

    ``cka_p``: one-sided p-value of CKA ≤ 1 − :data:`MARGIN`. ``mantel_p``: of RSA. ``knn_chance``: overlap of independent clouds.
    ``angle_…``: degrees, of the first principal components.

    Args:
        of_base, of_policy: their centred Gram matrices.
    """
    n, cka, without = len(base), cka_interval(of_base, of_policy), without_shift(base, policy)
    few = slice(0, MOST_FOR_PAIRS)
    distances = rsa(of_base[few, few], of_policy[few, few])
    k = min(N_COMPONENTS, n - 1, base.shape[1])
    varies = cka.value == cka.value
    angles = np.degrees(principal_angles(base[few], policy[few], k=k).numpy()) if varies else np.full(k, math.nan)
    figures: dict[str, object] = {**cka.named("cka"), "cka_biased": cka_of_grams(of_base, of_policy, debiased=False)}
    figures |= {"cka_p": equivalence(cka, n, low=1 - MARGIN, scale=COSINE).p_value}
    figures |= distances.interval.named("rsa") | {"mantel_p": distances.p_value, "rsa_null_high": distances.null_high}
    figures |= _neighbours(
        base, {"knn": (policy, of_policy), "knn_without_shift": (without, None)}, of_base, varies=varies
    )
    figures |= procrustes(base[few], policy[few]).named("procrustes")
    figures |= displacement(base, policy).named("displacement")
    figures |= displacement(base, without).named("displacement_without_shift")
    return figures | {"angle_mean": float(angles.mean()), "angle_largest": float(angles.max())}


def _neighbours(
    base: Tensor, others: dict[str, tuple[Tensor, Tensor | None]], of_base: Tensor, *, varies: bool
) -> dict[str, object]:
    """Share of nearest neighbours that each of some clouds keeps, and what independent clouds share."""
    k = min(N_NEIGHBOURS, len(base) - 2)
    figures: dict[str, object] = {"knn_chance": k / (len(base) - 1)}
    own = nearest(base, k, of_base)
    for name, (states, of_states) in others.items():
        found = neighbour_overlap(own, nearest(states, k, of_states)).interval if varies else NO_INTERVAL
        figures |= found.named(name)
    return figures


def draw_similarity(tables: Tables) -> Section:
    """The section of what :func:`similarity_tables` made."""
    table, cells = tables["similarity"], tables["similarity_map"]
    position = str(table["position"].iloc[0])
    here = _at(table, position)
    with house_style():
        figure, axes = new_figure(3, panel_height_cm=6.2)
        sentences = [
            draw_cka(axes[0], here, _at(table, CONTENT) if position != CONTENT else here.iloc[:0]),
            draw_neighbours(axes[1], here),
            draw_map(figure, axes[2], cells[cells["position"] == position]),
        ]
        axes[0].set_xlabel(SITES_LABEL)
        axes[1].set_xlabel(SITES_LABEL)
        set_titles(figure, axes, sentences)
    last = here[here["site"] == deepest(here["site"].tolist())].iloc[0]
    value, low, high = (as_text(last[f"cka{end}"], ".3f") for end in ("", "_low", "_high"))
    return Section(
        name="similarity",
        question="Are the policy’s representations the base’s?",
        claim="D-STEER: DPO changes what a model does, not what it believes: its representations stay as they were.",
        sentences=sentences,
        interval=f"Debiased CKA at {site_name(last['site'])}: {value}, 95 % CI {low} … {high} over {last['n_prompts']} prompts; "
        f"equivalent to 1 within {MARGIN} at {_n_equivalent(here)} of {len(here)} sites (one-sided, 5 % a site).",
        limits=[
            "Whether states were shifted: CKA, RSA, Procrustes and angles are of centred states, in which one shift of all "
            "states can’t be seen. Column displacement has it.",
            "Whether the same can be read from them: alike clouds may have lost the one direction that matters.",
            "Other seeds and other training: how alike two trainings are is for the arms of a study to say.",
        ],
        figure=figure,
        table=table,
        reading=_reading(here, tables["similarity_about"]),
        headlines=[_headline(here, last)],
        shown=_shown(table, position),
        more_tables={name: tables[name] for name in ("similarity_map", "similarity_about")},
    )


def draw_cka(axes: Axes, here: pd.DataFrame, content: pd.DataFrame) -> str:
    """CKA by site with its interval, RSA beside it, and CKA under random weights and at a content token."""
    sites = here["site"].tolist()
    prepare_sites(axes, sites)
    labels = draw_random(axes, here, "cka", name="random weights")
    shade_sites(axes, sites, here["cka_low"], here["cka_high"], colour=_NAVY)
    if content["site"].tolist() == sites:
        labels += plot_curves(axes, content, [Curve("cka", "CKA, content", "--", _BLUE)])
    labels += plot_curves(axes, here, [Curve("rsa", "RSA", ":", _BLUE), Curve("cka", "CKA", "-", _NAVY)])
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.03)
    axes.set_ylabel("likeness of base and policy")
    finish_sites(axes, sites, labels, room=0.34)
    alone = f"CKA of base and policy is {extremes(sites, here['cka'], '.3f')}"
    if is_known(here, "cka"):
        there = f"; at a content token {span(content['cka'], '.3f')}" if len(content) else ""
        return f"{alone}{there}; under random weights of equal norm {span(here['cka_random'], '.3f')}: {_beside_random(here)}"
    return f"{alone}; {MISSING}"


def draw_neighbours(axes: Axes, here: pd.DataFrame) -> str:
    """Share of nearest neighbours that are kept, raw and without v*, over what independent clouds share."""
    sites = here["site"].tolist()
    prepare_sites(axes, sites)
    shade_sites(axes, sites, here["knn_low"], here["knn_high"], colour=_NAVY)
    labels = plot_curves(axes, here, [Curve("knn_without_shift", "without v*", "--", _BLUE)])
    labels += plot_curves(axes, here, [Curve("knn", "neighbours", "-", _NAVY)])
    labels += plot_curves(axes, here, [Curve("procrustes", "Procrustes", ":", _GREY)])
    mark_level(axes, float(here["knn_chance"].iloc[0]))
    labels.append(EndLabel(float(here["knn_chance"].iloc[0]), "chance", _GREY))
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("share kept (neighbours)\nor left (Procrustes)")
    finish_sites(axes, sites, labels, room=0.34)
    chance = as_text(float(here["knn_chance"].iloc[0]), "percent")
    kept, without, left = (span(here[name], "percent") for name in ("knn", "knn_without_shift", "procrustes"))
    return (
        f"{kept} of a prompt’s nearest neighbours stay its neighbours ({without} without v*, chance {chance}); a rotation leaves "
        f"{left} of the cloud unexplained"
    )


def draw_map(figure: Figure, axes: Axes, cells: pd.DataFrame) -> str:
    """CKA of every site of the base with every site of the policy."""
    sites = list(dict.fromkeys(cells["base_site"]))
    grid = cells.pivot_table(index="base_site", columns="policy_site", values="cka", dropna=False).loc[sites, sites]
    values = grid.to_numpy(dtype=float)
    shown = axes.imshow(values, origin="lower", aspect="auto", interpolation="nearest", cmap="cividis")
    shown.set_clim(float(np.nanmin(values, initial=1.0)) - 1e-6, max(float(np.nanmax(values, initial=0.0)), 1e-6))
    axes.grid(visible=False)
    if values.size <= _MOST_NUMBERS and not np.isnan(values).all():
        middle = float(np.nanmean(values))
        for (row, column), value in np.ndenumerate(values):
            ink = "white" if value < middle else "black"
            axes.text(column, row, as_text(float(value), ".2f"), color=ink, ha="center", va="center", fontsize=6)
    bar = figure.colorbar(shown, ax=axes, pad=0.02, fraction=0.06)
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(labelsize=6)
    bar.set_label("CKA")
    ticks = shown_ticks(sites)
    names = [tick_name(sites[i], of=sites).strip() for i in ticks]
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    axes.set_xlabel("policy, after block (pre, post: around the final norm)")
    axes.set_ylabel("base, after block")
    known = ~np.isnan(values).all(axis=0)
    own = int((np.nanargmax(np.where(np.isnan(values), -9, values), axis=0) == np.arange(len(sites)))[known].sum())
    same, others = (span(pd.Series(values[mask]), ".2f") for mask in (np.eye(len(sites)) > 0, np.eye(len(sites)) == 0))
    return (
        f"{own} of {int(known.sum())} sites of the policy are most like the base’s own site of that depth (CKA {same}; of other "
        f"sites {others})"
    )


def _at(table: pd.DataFrame, position: str) -> pd.DataFrame:
    return table[table["position"] == position].reset_index(drop=True)


def _n_equivalent(here: pd.DataFrame) -> int:
    return int((here["cka_p"] <= 0.05).sum())


def _beside_random(here: pd.DataFrame) -> str:
    """Whether training changed states more than random weights do: CKA is then below theirs."""
    judged = here.loc[here["cka_random_verdict"] != UNKNOWN, "cka_random_verdict"]
    n_below = int((judged == BELOW).sum())
    if not len(judged):
        return "too few draws to judge"
    return f"below them at {n_below} of {len(judged)} sites" if n_below else "no more changed than by them"


def _headline(here: pd.DataFrame, last: pd.Series) -> Headline:
    beside = (
        f"random weights {as_text(last['cka_random'], '.3f')}; " if last["cka_random"] == last["cka_random"] else ""
    )
    what = (
        f"CKA of base and policy, beside random weights: {_beside_random(here)}"
        if is_known(here, "cka")
        else "CKA of base and policy"
    )
    return Headline(
        as_text(last["cka"], ".3f"),
        what,
        f"{site_name(last['site'])}, {last['position']}; {beside}blind to one shift of all states. similarity.csv, column cka.",
    )


def _shown(table: pd.DataFrame, position: str) -> pd.DataFrame:
    raw = _at(table, position)
    columns = {"CKA": raw["cka"], "random": raw["cka_random"], "RSA": raw["rsa"], "k-NN": raw["knn"]}
    columns |= {"k-NN, without v*": raw["knn_without_shift"], "Procrustes": raw["procrustes"]}
    columns |= {"displacement": raw["displacement"], "… without v*": raw["displacement_without_shift"]}
    columns |= {"angle °": raw["angle_largest"]}
    texts = {name: ["–" if x != x else as_text(float(x), ".3f") for x in found] for name, found in columns.items()}
    return pd.DataFrame({"site": raw["site"].tolist()} | texts)


def _reading(here: pd.DataFrame, said: pd.DataFrame) -> list[str]:
    first = here.iloc[0]
    lines = [
        f"States of the same tokens under both models at {first['position']}, base to {first['snapshot']}: {first['n_prompts']} "
        "prompts, one row each (the mean of its rows). Bands: 95 % intervals over prompts. Diamond: the final norm’s output.",
        "CKA: debiased linear CKA (Kornblith et al. 2019, Song et al. 2012): 1 for a rotation with a scale, 0 in the mean for "
        "independent clouds. The biased one, column cka_biased, goes to 1 with fewer prompts than dimensions whatever the clouds.",
        "RSA: Spearman’s ρ of the distances of all two prompts; mantel_p is Mantel’s test. Neighbours: share of the "
        f"{N_NEIGHBOURS} nearest by cosine that both models agree on (Huh et al. 2024). Procrustes: share of the centred cloud "
        f"that no rotation with a scale explains. RSA, Procrustes and angles are of the first {MOST_FOR_PAIRS} prompts at most.",
        "Without v*: the mean update of the other prompts is taken off each of the policy’s states. CKA, RSA, "
        "Procrustes and angles are of centred states, in which nothing changes by it; where neighbours or displacement do, the "
        "shift is what they saw.",
        "Displacement: energy of the change over the variance of the base’s states, nothing rotated. Angles: largest of the first "
        f"{N_COMPONENTS} principal components.",
    ]
    if here["cka"].isna().any():
        where: Sequence[str] = [site_name(site) for site in here.loc[here["cka"].isna(), "site"]]
        lines.append(
            f"No number at {', '.join(where)}: there the states of all prompts are equal under one of the models."
        )
    note = NOTE if is_known(here, "cka") else f"Here {MISSING}."
    return [*lines, *row_notes(said), note]
