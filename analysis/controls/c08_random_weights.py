"""Random weight changes as large as training's own beside its update, over the sites: columns, curves and words."""

import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import torch
from matplotlib.axes import Axes

from analysis.controls.comparison import Comparison, beside_draws
from analysis.open.observations import named
from analysis.report.site_axes import extremes, last_value, plot_sites, shade_sites
from analysis.report.style import COLOURS, EndLabel
from tiltmeter.metric_names import metric
from tiltmeter.stats.among_random import ABOVE, UNKNOWN, among_random
from tiltmeter.weights.random_update import RandomUpdates

NAMES: Mapping[str, str] = named("random_update") | {
    "mean_cosine_split_half": metric("mean_cosine", "split_half", "random_update"),
    "cka": metric("similarity", "cka", "random_update"),
}
"""Column of tables → name of the figure in the draws."""
NOTE = (
    "Random weights (control C8): Gaussian changes of the base’s weights with the Frobenius norm of training’s own change of each "
    "matrix; no training. Grey band: range of the draws. “Above” them is what lies over all draws and "
    "over the 95 % prediction interval of one more."
)
_ADDED = (
    *("_random", "_random_low", "_random_high", "_random_expected_low", "_random_expected_high", "_random_verdict"),
    "_rotated",
)
MISSING = "random weight changes of equal norm were not read beside it"


def compare(value: float, found: RandomUpdates | None, position: str, site: str, column: str) -> Comparison:
    """A figure of the update beside that of the Gaussian weight changes; NaN where none were read.

    Args:
        column: of :data:`NAMES`.
    """
    drawn = _values(found, "gaussian", position, site, column)
    own, draws = (torch.tensor(x, dtype=torch.float64) for x in ([value], [drawn]))
    return beside_draws(among_random(own, draws))


def with_random(
    table: pd.DataFrame, found: RandomUpdates | None, position: str, columns: Iterable[str]
) -> pd.DataFrame:
    """The table, a row a site, with the same figures under random weights; NaN where none were read.

    For each column there is also ``…_random`` (mean over the Gaussian draws), ``…_random_low`` and ``…_random_high`` (their range),
    ``…_random_expected_low`` and ``…_high`` (95 % prediction interval of one more draw), ``…_random_verdict``
    (:func:`tiltmeter.stats.among_random.among_random`), and ``…_rotated``, the mean over draws that keep the update's singular
    values.
    """
    added: dict[str, list[object]] = {}
    for column in columns:
        own = table[column].tolist() if column in table else [math.nan] * len(table)
        for name in _ADDED:
            added[f"{column}{name}"] = []
        for site, value in zip(table["site"], own, strict=True):
            beside = compare(value, found, position, site, column)
            rotated = _values(found, "rotated", position, site, column)
            kept = sum(rotated) / len(rotated) if rotated else math.nan
            span = beside.draws.random_low, beside.draws.random_high, *beside.draws.prediction[1:]
            for name, x in zip(_ADDED, (beside.null, *span, beside.verdict, kept), strict=True):
                added[f"{column}{name}"].append(x)
    return pd.concat([table.reset_index(drop=True), pd.DataFrame(added)], axis=1)


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
    """Whether random weights give as much, in words: by the number of sites at which the figure is above them.

    >>> at = {"site": ["layer_00"], "f": [0.9], "f_random": [0.5], "f_random_verdict": ["above random"]}
    >>> verdict(pd.DataFrame(at), "f"), verdict(pd.DataFrame(at | {"f_random_verdict": ["below random"]}), "f")
    ('above them', 'reproduced by random weights')
    """
    judged = table.loc[difference(table, column).notna(), f"{column}_random_verdict"]
    judged = judged[judged != UNKNOWN]
    n_above, n = int((judged == ABOVE).sum()), len(judged)
    if not n:
        return "too few draws to judge"
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
    return f"{what} less that of random weights of equal norm is {less}: {verdict(table, column)}"


def _values(found: RandomUpdates | None, form: str, position: str, site: str, column: str) -> list[float]:
    draws = () if found is None else found.draws
    here = [d.figures for d in draws if (d.form, d.position, d.site) == (form, position, site)]
    return [figures[NAMES[column]] for figures in here if NAMES[column] in figures]
