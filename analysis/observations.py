"""What a run's probe said of hidden states, out of metrics.csv: a row for each observation, position and site."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from tiltmeter.layers import FINAL_POST_NORM, FINAL_PRE_NORM

STEPS_TAKEN = "probe/steps_taken"
"""Optimizer steps before an observation; metrics.csv has it in every row that a probe wrote."""
USUAL_POSITION, DIVERGE = "prompt_last", "diverge"
UPDATE = {
    "shift_share": "shift_share/delta",
    "top1_energy": "top1_energy/delta",
    "top1_energy_centred": "top1_energy/delta_centred",
    "entropy_energy": "spectral_entropy/delta/energy",
    "entropy_energy_centred": "spectral_entropy/delta_centred/energy",
    "mean_cosine_in_sample": "mean_cosine/in_sample",
    "mean_cosine_leave_one_out": "mean_cosine/leave_one_out",
}
"""What is told of the update ΔH at every site: column of tables → name in metrics.csv, before the site."""
_WHERE = ("steps_taken", "position", "site")
_READ_WHERE_CHOICES_PART = ("projection", "projection_sequence", "direction_cosine")
"""Families that are always read at ``diverge`` and don't say so."""
_PLACED = re.compile(rf"(.+)/(layer_\d{{2,4}}|{FINAL_PRE_NORM}|{FINAL_POST_NORM})(?:@(\w+))?")


class GeometryRow(NamedTuple):
    """The update ΔH at one site; NaN where a run didn't log it. Shares 0 … 1, entropies in nats."""

    steps_taken: int
    position: str
    site: str
    shift_share: float
    """f: share of ΔH that is one constant row."""
    top1_energy: float
    """ρ₁: share along the first direction; never below f."""
    top1_energy_centred: float
    """ρ₁ of ΔH less its mean row."""
    entropy_energy: float
    entropy_energy_centred: float
    mean_cosine_in_sample: float
    mean_cosine_leave_one_out: float


def observed(metrics: pd.DataFrame) -> pd.DataFrame:
    """All readings: columns ``steps_taken``, ``position``, ``site``, then each metric under its name before the site.

    Rows are ordered by steps, position and depth; numbers that aren't finite are NaN. Empty for a run without a probe.
    """
    placed = {name: match.groups() for name in metrics.columns if (match := _PLACED.fullmatch(name))}
    if STEPS_TAKEN not in metrics or not placed:
        return pd.DataFrame(columns=["steps_taken", "position", "site"])
    rows = metrics[metrics[STEPS_TAKEN].between(0, 1e12)]
    finite = rows[list(placed)].where(rows[list(placed)].abs() < math.inf)
    moments = finite.groupby(rows[STEPS_TAKEN].astype(int)).last()  # callbacks write a row each; the later one counts
    moments.index.name = "steps_taken"
    columns: dict[tuple[str, str], dict[str, str]] = {}
    for name, (what, site, position) in placed.items():
        usual = DIVERGE if what.split("/")[0] in _READ_WHERE_CHOICES_PART else USUAL_POSITION
        columns.setdefault((position or usual, site), {})[what] = name
    parts = []
    for (position, site), names in columns.items():
        part = moments[list(names.values())].set_axis(list(names), axis=1).dropna(how="all").reset_index()
        part.insert(1, "position", position)
        part.insert(2, "site", site)
        parts.append(part)
    table = pd.concat(parts, ignore_index=True)
    order = table.assign(depth=table["site"].map(_depth)).sort_values(["steps_taken", "position", "depth"])
    return order.drop(columns="depth").reset_index(drop=True)


def updates(table: pd.DataFrame) -> pd.DataFrame:
    """The readings after a step that say something of the update, at the one position that figures show.

    That is ``prompt_last``, or the first other position when the run didn't read it.
    """
    known = [name for name in UPDATE.values() if name in table]
    found = table[table[known].notna().any(axis=1)] if known else table.iloc[:0]
    positions = list(found["position"].unique())
    shown = USUAL_POSITION if USUAL_POSITION in positions else (positions or [USUAL_POSITION])[0]
    return found[found["position"] == shown]


def latest(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last observation among those given, in the order of the forward pass."""
    steps = table["steps_taken"]
    return table[(steps == steps.max()) | steps.isna()].reset_index(drop=True)  # NaN: one reading, at unknown steps


def after_steps(steps: float) -> str:
    """When an observation was made, in words.

    >>> after_steps(120), after_steps(math.nan)
    ('after 120 steps', 'in the aligned model')
    """
    return f"after {steps:.0f} steps" if steps == steps else "in the aligned model"


def geometry_rows(metrics: pd.DataFrame) -> list[GeometryRow]:
    """The update at every site as last observed, in the order of the forward pass; none for a run without a probe."""
    last = latest(updates(observed(metrics))).reindex(columns=[*_WHERE, *UPDATE.values()])
    return [GeometryRow(*row) for row in last.itertuples(index=False)]


def most_entropy(table: pd.DataFrame) -> float:
    """ln min(N, d) in nats, which no entropy of N rows of width d can pass; NaN when it can't be told.

    metrics.csv has each entropy also as a share of it.
    """
    found = []
    for name in table.columns:
        whole = name.replace("normalized_entropy/", "spectral_entropy/")
        if name.startswith("normalized_entropy/") and whole in table:
            there = table[name] > 1e-6
            found += (table.loc[there, whole] / table.loc[there, name]).tolist()
    return float(pd.Series(found).median()) if found else math.nan


def site_name(site: str) -> str:
    """A site in words.

    >>> site_name("layer_06"), site_name("final_post_norm")
    ('layer 6', 'the final norm’s output')
    """
    named = {FINAL_PRE_NORM: "the last layer", FINAL_POST_NORM: "the final norm’s output"}
    return named.get(site) or f"layer {int(site.removeprefix('layer_'))}"


def deepest(sites: Sequence[str]) -> str:
    """The site furthest along the forward pass."""
    return max(sites, key=_depth)


def _depth(site: str) -> int:
    """A number that orders sites, whatever the model's depth."""
    final = {FINAL_PRE_NORM: 10**6, FINAL_POST_NORM: 10**6 + 1}
    return final[site] if site in final else int(site.removeprefix("layer_"))
