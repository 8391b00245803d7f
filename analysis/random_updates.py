"""Random weight changes as large as training's own beside its update, over the sites: columns, curves and words."""

import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes

from analysis.figures import COLOURS, EndLabel
from analysis.observations import named
from analysis.site_axes import extremes, last_value, plot_sites, shade_sites
from tiltmeter.stats.draws import prediction_interval
from tiltmeter.weights.random_update import RandomUpdates

NAMES: Mapping[str, str] = named("random_update") | {"mean_cosine_split_half": "mean_cosine/split_half/random_update"}
"""Column of tables → name of the figure in the draws."""
NOTE = (
    "Random weights (control C8): Gaussian changes of the base’s weights with the Frobenius norm of training’s own change of each "
    "matrix; no training. Grey band: range of the draws. “Above” them is what lies over the 95 % prediction interval of one more "
    "draw."
)
MISSING = "random weight changes of equal norm were not read beside it"


def with_random(
    table: pd.DataFrame, found: RandomUpdates | None, position: str, columns: Iterable[str]
) -> pd.DataFrame:
    """The table, a row a site, with the same figures under random weights; NaN where none were read.

    For each column there is also ``…_random`` (mean over the Gaussian draws), ``…_random_low`` and ``…_random_high`` (their range),
    ``…_random_expected_low`` and ``…_high`` (95 % prediction interval of one more draw), and ``…_rotated``, the mean over draws
    that keep the update's singular values.
    """
    added: dict[str, list[float]] = {}
    for column in columns:
        ends = ("", "_low", "_high", "_expected_low", "_expected_high")
        for name in (*(f"{column}_random{end}" for end in ends), f"{column}_rotated"):
            added[name] = []
        for site in table["site"]:
            gaussian, rotated = (_values(found, form, position, site, column) for form in ("gaussian", "rotated"))
            mean, low, high = prediction_interval(gaussian)
            of_draws = (mean, min(gaussian, default=math.nan), max(gaussian, default=math.nan), low, high)
            for end, value in zip(ends, of_draws, strict=True):
                added[f"{column}_random{end}"].append(value)
            added[f"{column}_rotated"].append(sum(rotated) / len(rotated) if rotated else math.nan)
    return pd.concat([table.reset_index(drop=True), pd.DataFrame(added, dtype=float)], axis=1)


def draws_table(found: RandomUpdates) -> pd.DataFrame:
    """Every figure of every draw, a row each."""
    rows = [
        {"form": d.form, "draw": d.draw, "position": d.position, "site": d.site, "metric": name, "value": value}
        for d in found.draws
        for name, value in d.figures.items()
    ]
    return pd.DataFrame(rows)


def draw_random(
    axes: Axes, table: pd.DataFrame, column: str, *, name: str = "random", style: str = "-"
) -> list[EndLabel]:
    """Range and mean of the draws in grey, as far as there are any; returns their label."""
    mean = table[f"{column}_random"]
    if mean.isna().all():
        return []
    sites = table["site"].tolist()
    shade_sites(axes, sites, table[f"{column}_random_low"], table[f"{column}_random_high"])
    plot_sites(axes, sites, mean, style=style, colour=COLOURS["random_update"])
    return [EndLabel(last_value(mean), name, COLOURS["random_update"])]


def difference(table: pd.DataFrame, column: str) -> pd.Series:
    """The figure less its mean under random weights."""
    return table[column] - table[f"{column}_random"]


def is_known(table: pd.DataFrame, column: str) -> bool:
    """Whether there is a figure and draws to hold it against, at any site."""
    return bool(difference(table, column).notna().any())


def verdict(table: pd.DataFrame, column: str) -> str:
    """Whether random weights give as much: in words, by how many sites lie above one more draw's prediction interval.

    >>> at = {"site": ["layer_00"], "f": [0.9], "f_random": [0.5], "f_random_expected_high": [0.6]}
    >>> verdict(pd.DataFrame(at), "f"), verdict(pd.DataFrame(at | {"f": [0.55]}), "f")
    ('above them', 'reproduced by random weights')
    """
    known = difference(table, column).notna()
    n_above, n = int((table[column] > table[f"{column}_random_expected_high"]).sum()), int(known.sum())
    if not n_above:
        return "reproduced by random weights"
    return (
        "above them"
        if n == 1
        else "above them at every site"
        if n_above == n
        else f"above them at {n_above} of {n} sites"
    )


def said_of_difference(table: pd.DataFrame, column: str, what: str) -> str:
    """The figure less that of random weights, and what follows from it."""
    sites: Sequence[str] = table["site"].tolist()
    less = extremes(sites, difference(table, column), "+.2f")
    return f"{what} less {what} under random weights of equal norm: {less}, {verdict(table, column)}"


def _values(found: RandomUpdates | None, form: str, position: str, site: str, column: str) -> list[float]:
    draws = () if found is None else found.draws
    here = [d.figures for d in draws if (d.form, d.position, d.site) == (form, position, site)]
    return [figures[NAMES[column]] for figures in here if NAMES[column] in figures]
