"""Observations of a run's hidden states, out of metrics.csv: a row for each observation, position and site."""

import math
from collections.abc import Sequence
from itertools import product

import pandas as pd

from tiltmeter.metric_names import MATRICES, STEPS_TAKEN, WEIGHTS, find, matrix, metric
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM

USUAL_POSITION, CONTENT, DIVERGE = "prompt_last", "content", "diverge"


def named(of: str) -> dict[str, str]:
    """Names in metrics.csv, without the site, by column of tables: what is logged of a matrix such as ``base``.

    >>> named("base")["mean_cosine_in_sample"], named("delta")["mean_cosine_in_sample"]
    ('mean_cosine/in_sample/base', 'mean_cosine/in_sample')
    """
    centred, whose = (
        matrix(of, "centred"),
        "" if of == "delta" else of,
    )  # cosines are the update's unless they say otherwise
    return {
        "shift_share": metric("shift_share", of),
        "top1_energy": metric("top1_energy", of),
        "top1_energy_centred": metric("top1_energy", centred),
        "sigma_ratio": metric("sigma_ratio", of),
        "cos_top_mean": metric("top_direction_cosine", of),
        "sigma_ratio_centred": metric("sigma_ratio", centred),
        "entropy_energy": metric("spectral_entropy", of, "energy"),
        "entropy_energy_centred": metric("spectral_entropy", centred, "energy"),
        "entropy_singular": metric("spectral_entropy", of, "singular"),
        "entropy_singular_centred": metric("spectral_entropy", centred, "singular"),
        "effective_rank_energy": metric("effective_rank", of, "energy"),
        "effective_rank_singular": metric("effective_rank", of, "singular"),
        "mean_cosine_in_sample": metric("mean_cosine", "in_sample", whose),
        "mean_cosine_leave_one_out": metric("mean_cosine", "leave_one_out", whose),
    }


UPDATE = named("delta")
"""Metrics by column that are logged of the update ΔH."""


def observed(metrics: pd.DataFrame) -> pd.DataFrame:
    """All readings: columns ``steps_taken``, ``position``, ``site``, then each metric under its name without the site.

    Rows are ordered by steps, position and depth; numbers that aren't finite are NaN. Empty for a run without a probe.
    """
    placed = {name: found for name in metrics.columns if (found := find(name)) and found.site}
    if STEPS_TAKEN not in metrics or not placed:
        return pd.DataFrame(columns=["steps_taken", "position", "site"])
    rows = metrics[metrics[STEPS_TAKEN].between(0, 1e12)]
    finite = rows[list(placed)].where(rows[list(placed)].abs() < math.inf)
    moments = finite.groupby(rows[STEPS_TAKEN].astype(int)).last()  # callbacks write a row each; the later one counts
    columns: dict[tuple[str | None, str | None], dict[str, str]] = {}
    for name, found in placed.items():
        columns.setdefault((found.position, found.site), {})[found.key] = name
    parts = []
    for (at, site), names in columns.items():
        part = moments[list(names.values())].set_axis(list(names), axis=1).dropna(how="all")
        where = pd.DataFrame({"steps_taken": part.index, "position": at, "site": site}, index=part.index)
        parts.append(pd.concat([where, part], axis=1))
    table = pd.concat(parts, ignore_index=True)
    where = table[["steps_taken", "position"]].assign(depth=table["site"].map(_depth))
    return table.loc[where.sort_values(list(where)).index].reset_index(drop=True)


def updates(table: pd.DataFrame, position: str | None = None) -> pd.DataFrame:
    """The readings after a step that say something of the update, at one position.

    Args:
        position: None: the one that figures show, ``prompt_last``, or the first other one when the run didn't read it.
    """
    known = [name for name in UPDATE.values() if name in table]
    found = table[table[known].notna().any(axis=1)] if known else table.iloc[:0]
    positions = list(found["position"].unique())
    if position is None:
        position = USUAL_POSITION if USUAL_POSITION in positions else (positions or [USUAL_POSITION])[0]
    return found[found["position"] == position]


def latest(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last observation among those given, in the order of the forward pass."""
    steps = table["steps_taken"]
    return table[(steps == steps.max()) | steps.isna()].reset_index(drop=True)  # NaN: one reading, at unknown steps


def after_steps(steps: float) -> str:
    """Time of an observation, in words.

    >>> after_steps(120), after_steps(math.nan)
    ('after 120 steps', 'in the aligned model')
    """
    return f"after {steps:.0f} steps" if steps == steps else "in the aligned model"


def most_entropy(table: pd.DataFrame) -> float:
    """ln min(N, d) in nats, which no entropy of N rows of width d can pass; NaN when it can't be told.

    metrics.csv has each entropy also as a share of it.
    """
    found: list[float] = []
    for parts in product(MATRICES, WEIGHTS):
        share, whole = metric("normalized_entropy", *parts), metric("spectral_entropy", *parts)
        if share in table and whole in table:
            there = table[table[share] > 1e-6]
            found += (there[whole] / there[share]).tolist()
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
