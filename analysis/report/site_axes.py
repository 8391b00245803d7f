"""Curves over sites, in the order of the forward pass, or over steps; and numbers as the sentences above them say them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.open.observations import site_name
from analysis.report.style import COLOURS, EndLabel, house_style, label_ends, new_figure, set_titles
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM

SITES_LABEL = "after block (pre, post: around the final norm)"
_MOST_TICKS = 9
_LARGEST = 1e6
"""From here on numbers are written with an exponent; none of them is expected to be so large."""


Panel = Callable[[Axes, pd.DataFrame], str]
"""Draws one panel from a table and returns its message."""


class Curve(NamedTuple):
    """A column of a table with a row for each site, and how it is drawn."""

    column: str
    name: str
    """At the right end."""
    style: str
    colour: str


def draw_panels(
    panels: Sequence[Panel], table: pd.DataFrame, *, panel_height_cm: float, x_label: str = ""
) -> tuple[Figure, list[str]]:
    """Panels below each other, and the message of each, its title.

    Args:
        x_label: under the last panel; empty: panels have their own.
    """
    with house_style():
        figure, axes = new_figure(len(panels), panel_height_cm=panel_height_cm)
        sentences = [draw(panel, table) for draw, panel in zip(panels, axes, strict=True)]
        if x_label:
            axes[-1].set_xlabel(x_label)
        set_titles(figure, axes, sentences)
    return figure, sentences


draw_over_sites = partial(draw_panels, x_label=SITES_LABEL)
"""Panels over the same sites."""


def draw_over_steps(
    panels: Sequence[Panel], table: pd.DataFrame, *, panel_height_cm: float = 5.2
) -> tuple[Figure, list[str]]:
    """Panels below each other over the table's column ``steps_taken``, and the message of each."""
    sentences = []
    with house_style():
        figure, axes = new_figure(len(panels), panel_height_cm=panel_height_cm)
        for panel, draw in zip(axes, panels, strict=True):
            panel.set_xlim(0, max(1.0, float(table["steps_taken"].max())))
            sentences.append(draw(panel, table))
        axes[-1].set_xlabel("optimizer steps taken")
        set_titles(figure, axes, sentences)
    return figure, sentences


def prepare_sites(axes: Axes, sites: Sequence[str]) -> None:
    """Limits for curves over sites; call before drawing."""
    axes.set_xlim(-0.3, len(sites) - 0.7)


def plot_sites(
    axes: Axes,
    sites: Sequence[str],
    values: pd.Series,
    *,
    style: str | tuple[float, tuple[float, ...]] = "-",
    colour: str = "",
    is_behind: bool = False,
) -> None:
    """One quantity at each site: the residual stream as a line, the final norm's output as a point of its own scale.

    Args:
        is_behind: broad and pale, for what another line is compared with.
    """
    residual = np.array([site != FINAL_POST_NORM for site in sites])
    x, y = np.arange(len(sites)), values.to_numpy(dtype=float)
    look: dict[str, Any] = {"color": colour or COLOURS["policy"]}
    look |= {"linewidth": 4.0, "alpha": 0.35, "zorder": 1} if is_behind else {}
    marker = "o" if len(sites) <= _MOST_TICKS + 3 and not is_behind else ""
    axes.plot(x[residual], y[residual], linestyle=style, marker=marker, markersize=2.5, **look)
    axes.plot(x[~residual], y[~residual], linestyle="", marker="D", markersize=5.5 if is_behind else 2.8, **look)


def plot_curves(axes: Axes, table: pd.DataFrame, curves: Sequence[Curve]) -> list[EndLabel]:
    """Curves over the sites, but for those without a number; returns their labels."""
    sites, labels = table["site"].tolist(), []
    for column, name, style, colour in curves:
        if table[column].notna().any():
            plot_sites(axes, sites, table[column], style=style, colour=colour)
            labels.append(EndLabel(last_value(table[column]), name, colour))
    return labels


def shade_sites(axes: Axes, sites: Sequence[str], low: pd.Series | float, high: pd.Series, *, colour: str = "") -> None:
    """A band over the sites, apart for the final norm's output: grey for a null distribution, a colour for an interval."""
    top = high.to_numpy(dtype=float)
    bottom = np.broadcast_to(np.asarray(low, dtype=float), top.shape)
    residual = np.array([site != FINAL_POST_NORM for site in sites])
    look: dict[str, Any] = {
        "color": colour or COLOURS["null"],
        "alpha": 0.2 if colour else 0.45,
        "linewidth": 0,
        "zorder": 0,
    }
    for part in (residual, ~residual):
        x = np.flatnonzero(part)
        if len(x) > 1:
            axes.fill_between(x, bottom[x], top[x], **look)
        elif len(x) == 1:  # a band needs some width
            width = 0.15 * max(1.0, len(sites) / 8)
            axes.fill_between([x[0] - width, x[0] + width], bottom[x].repeat(2), top[x].repeat(2), **look)


def finish_sites(axes: Axes, sites: Sequence[str], labels: Sequence[EndLabel], *, room: float = 0.26) -> None:
    """Labels at the right, then the names of the sites below; call when everything is drawn."""
    label_ends(axes, [label for label in labels if np.isfinite(label.y)], room=room)
    ticks = shown_ticks(sites)
    axes.set_xticks(ticks, [tick_name(sites[i], of=sites) for i in ticks])


def shown_ticks(sites: Sequence[str]) -> list[int]:
    """Sites to name on an axis: all of a few; of many, evenly spaced ones and those around the final norm."""
    n = len(sites)
    if n <= _MOST_TICKS:
        return list(range(n))
    final = [i for i, site in enumerate(sites) if site in (FINAL_PRE_NORM, FINAL_POST_NORM)]
    blocks = n - len(final)
    step = next(s for s in (1, 2, 4, 5, 8, 10, 20, 50, 100, 1000) if blocks <= s * _MOST_TICKS)
    inner = [i for i in range(0, blocks, step) if not final or i <= blocks - max(1, step // 2)]
    return inner + final


def tick_name(site: str, *, of: Sequence[str]) -> str:
    """A site on an axis; the last two stand on two lines where they would touch."""
    if site == FINAL_PRE_NORM:
        return "pre"
    if site == FINAL_POST_NORM:
        return "post" if len(of) <= _MOST_TICKS else "\npost"
    return str(int(site.removeprefix("layer_")))


def last_value(values: pd.Series) -> float:
    """End of a curve, for its label."""
    known = values.dropna()
    return float(known.iloc[-1]) if len(known) else float("nan")


def extremes(sites: Sequence[str], values: pd.Series, form: str, *, unit: str = "") -> str:
    r"""Least and largest value with their sites; one number when there is one, or when they read the same.

    >>> extremes(["layer_00", "layer_01"], pd.Series([0.401, 0.912]), "percent")
    '40\xa0% (layer 0) to 91\xa0% (layer 1)'
    """
    known = values.reset_index(drop=True).dropna()
    if known.empty:
        return "not known"
    low, high = int(known.idxmin()), int(known.idxmax())
    texts = [as_text(float(known[i]), form) for i in (low, high)]
    unit = f" {unit}" if unit else ""
    if texts[0] == texts[1]:
        at = f" at {site_name(sites[low])}" if len(known) == 1 else " at every site"
        return f"{texts[0]}{unit}{at}"
    return f"{texts[0]} ({site_name(sites[low])}) to {texts[1]}{unit} ({site_name(sites[high])})"


def span(values: pd.Series, form: str) -> str:
    r"""Least and largest value; one number when they read the same.

    >>> span(pd.Series([0.401, 0.912]), ".2f")
    '0.40 to 0.91'
    """
    known = values.dropna()
    if known.empty:
        return "not known"
    low, high = (as_text(float(x), form) for x in (known.min(), known.max()))
    return low if low == high else f"{low} to {high}"


def as_text(value: float, form: str) -> str:
    r"""A number in a sentence: ``percent`` of a share, or a format such as ``.2f`` or ``+.2f``, with a real minus.

    >>> as_text(0.913, "percent"), as_text(0.9965, "percent"), as_text(-0.5, "+.2f"), as_text(-0.001, ".2f")
    ('91\xa0%', '99.7\xa0%', '−0.50', '0.00')
    >>> as_text(-0.001, "percent")
    '0\xa0%'
    """
    if abs(value) >= _LARGEST:
        return f"{value:.1e}".replace("-", "−")
    if form == "percent":
        digits = 1 if 0.995 <= value < 1 else 0  # a share short of everything is not 100 %
        text = f"{min(100 * value, 99.9) if digits else 100 * value:.{digits}f}\u00a0%"
        return (text[1:] if text.startswith("-0\u00a0") else text).replace("-", "−")
    text = format(value, form)
    if not text.strip("+-0."):
        text = text.replace("-", "" if not form.startswith("+") else "±").replace("+", "±")
    return text.replace("-", "−")
