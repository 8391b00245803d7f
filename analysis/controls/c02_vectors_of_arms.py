"""Controls C2, C5 and C9: the steering vectors v* of all runs of a study beside each other.

C2, seed twin: the same run with another seed and order of data. "The" steering vector fails if cos(v*_a, v*_b) < .5.
C5, swapped labels: v* should turn round. The claim fails if its cosine with dpo's is not below 0.
C9, SFT as a ruler: what plain training on chosen text moves. v* is not of preferences if it is SFT's, by the cosine.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations, product

import pandas as pd
import torch
from matplotlib.axes import Axes

from analysis.claims.statistics import Read, upper_sites
from analysis.open.observations import USUAL_POSITION, site_name
from analysis.open.studies import ARM_NAMES, DPO
from analysis.report.page import Headline, Section
from analysis.report.site_axes import as_text, draw_panels
from analysis.report.style import COLOURS
from tiltmeter.geometry.consistency import cosine
from tiltmeter.states.capture import ReadPoint

NAME = "vectors_of_arms"
SAME_SEED = 0.5
"""Cosine of two seeds' v* below which there is no "the" steering vector."""


def vector_table(reads: Mapping[str, Sequence[Read]]) -> pd.DataFrame:
    """cos(v*_a, v*_b) between each dpo run and every other run, a row for each site.

    Args:
        reads: arm → hidden states of its runs.
    """
    rows = []
    for site in _sites(reads):
        vectors = {(arm, i): _vector(read, site) for arm, ones in reads.items() for i, read in enumerate(ones)}
        twins = combinations([key for key in vectors if key[0] == DPO], 2)
        others = product([key for key in vectors if key[0] == DPO], [key for key in vectors if key[0] != DPO])
        for (arm_a, a), (arm_b, b) in (*twins, *others):
            one, other = vectors[arm_a, a], vectors[arm_b, b]
            rows.append(
                {"site": site, "arm": arm_b, "seed": reads[arm_b][b].seed, "dpo_seed": reads[DPO][a].seed}
                | {"cosine": float(cosine(one, other)), "norm_ratio": float(other.norm() / one.norm())}
            )
    return pd.DataFrame(rows, columns=["site", "arm", "seed", "dpo_seed", "cosine", "norm_ratio"])


def vectors_section(table: pd.DataFrame) -> Section:
    """The section ``vectors_of_arms``.

    Args:
        table: :func:`vector_table`, of one dpo run and another run at least.
    """
    figure, sentences = draw_panels([partial(_draw)], table, panel_height_cm=6.4)
    at = table[table["site"] == _shown(table)]
    twins = at[at["arm"] == DPO]["cosine"]
    return Section(
        name=NAME,
        question="Is v* the same in another seed, turned round by swapped labels, and not SFT’s?",
        claim="Controls C2, C5, C9: two seeds have one v*, swapped labels turn it round, SFT on chosen text has another.",
        sentences=sentences,
        interval="None: dots are all pairs of runs; runs share their prompts, so the spread is that of seeds alone.",
        limits=[
            "Preferences: arms that all move a template’s last token alike have cosines near 1 whatever they learnt (K4).",
            "Whether v* does anything: claims K7 and K8.",
        ],
        figure=figure,
        table=table,
        reading=[
            "A dot is a pair of a dpo run and another run; lines are their means over pairs, by site.",
            f"Dashed: {SAME_SEED}, 0.",
        ],
        headlines=[Headline(f"{twins.mean():.2f}", f"cos(v*, v*) of two seeds at {site_name(_shown(table))}", NAME)]
        if len(twins)
        else [],
    )


def _vector(read: Read, site: str) -> torch.Tensor:
    return read.states.update(ReadPoint(site, "prompt_last")).mean(0)


def _sites(reads: Mapping[str, Sequence[Read]]) -> list[str]:
    """Sites that every run has read at the end of prompts."""
    found = [
        [p.site for p in read.states.points if p.position == USUAL_POSITION] for ones in reads.values() for read in ones
    ]
    return [site for site in found[0] if all(site in sites for sites in found)] if found else []


def _shown(table: pd.DataFrame) -> str:
    sites = list(dict.fromkeys(table["site"]))
    return (upper_sites(sites) or sites)[-1]


def _draw(axes: Axes, table: pd.DataFrame) -> str:
    """Cosines with dpo's v* by arm, at the last upper site."""
    site = _shown(table)
    at = table[table["site"] == site]
    arms = list(dict.fromkeys(at["arm"]))
    for level in (0.0, SAME_SEED):
        axes.axvline(level, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for y, arm in enumerate(arms):
        found = at[at["arm"] == arm]["cosine"]
        colour = COLOURS.get(arm, COLOURS["policy"])
        axes.plot(found, [y] * len(found), "o", color=colour, alpha=0.6)
        axes.plot([found.mean()] * 2, [y - 0.3, y + 0.3], color=colour)
    axes.set_yticks(range(len(arms)), ["another seed" if arm == DPO else ARM_NAMES.get(arm, arm) for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.set_xlim(min(-0.05, float(at["cosine"].min()) - 0.05), 1.05)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("cosine with dpo’s v*")
    means = at.groupby("arm")["cosine"].mean()
    twin = means.get(DPO, math.nan)
    said = [f"{ARM_NAMES.get(arm, arm)} {as_text(means[arm], '.2f')}" for arm in arms if arm != DPO]
    first = (
        f"v* of two seeds have a cosine of {as_text(twin, '.2f')}" if twin == twin else "There is one seed of dpo alone"
    )
    return f"At {site_name(site)}: {first}{'; with ' + ', '.join(said) if said else ''}"
