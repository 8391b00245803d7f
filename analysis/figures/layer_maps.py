"""Site × observation maps of shift share, entropy and cosine: when and in which layers each arises."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.open.observations import site_name, updates
from analysis.open.observed import Observed, Tables
from analysis.report.page import Section
from analysis.report.site_axes import as_text, shown_ticks, tick_name
from analysis.report.style import house_style, new_figure, set_titles
from tiltmeter.metric_names import metric
from tiltmeter.models.layers import FINAL_PRE_NORM

_COLOUR_MAP = "cividis"
_MOST_NUMBERS = 60
"""Cells up to which their numbers are written into them."""
_MOST_COLUMNS = 6
"""Observations up to which each is named below the map, and numbers fit into its cells."""
_MOST_ROWS = 12
"""Sites up to which names of neighbours don't touch."""


@dataclass(frozen=True)
class Map:
    """One panel: what is drawn, how numbers are written, and the colours' lower and upper end (None: the largest value)."""

    name: str
    column: str
    title: str
    form: str
    low: float
    high: float | None
    tells: str = "largest"
    """Site whose course the title tells: the one where the last value is ``largest`` or ``smallest``."""


def _column(*parts: str) -> str:
    """A metric's column in the table."""
    return metric(*parts).replace("/", "_")


MAPS = (
    Map("shift share f", _column("shift_share", "delta"), "f", "percent", 0.0, 1.0),
    Map(
        "entropy of ΔH (nats)",
        _column("spectral_entropy", "delta", "energy"),
        "The update’s energy entropy",
        ".2f",
        0.0,
        None,
        "smallest",
    ),
    Map(
        "cosine, leave-one-out",
        _column("mean_cosine", "leave_one_out"),
        "The leave-one-out cosine with v*",
        ".3f",
        0.0,
        1.0,
    ),
)


def layers_by_step_tables(seen: Observed) -> Tables | None:
    """``layers_by_step``: a row for each observation and site, a column for each map."""
    found = updates(seen.table).rename(columns=lambda name: name.replace("/", "_"))
    known = [m.column for m in MAPS if m.column in found and found[m.column].notna().any()]
    return {"layers_by_step": found[["steps_taken", "position", "site", *known]]} if known else None


def draw_layers_by_step(tables: Tables) -> Section:
    """The section of what :func:`layers_by_step_tables` made."""
    seen = tables["layers_by_step"]
    maps = [m for m in MAPS if m.column in seen]
    sites = list(dict.fromkeys(seen["site"]))
    with house_style():
        figure, axes = new_figure(len(maps), panel_height_cm=max(4.6, min(6.0, 2.6 + 0.3 * len(sites))))
        sentences = [draw_map(figure, panel, m, seen, sites) for m, panel in zip(maps, axes, strict=True)]
        axes[-1].set_xlabel("optimizer steps taken")
        set_titles(figure, axes, sentences)
    return Section(
        name="layers_by_step",
        question="When does it happen, and in which layers?",
        claim="D-STEER, Fig. 4, says in which layers of a finished model (the upper ones); when it comes about is not told there.",
        sentences=sentences,
        interval="None: each cell is one reading of the same probe, so cells of a row share their pairs.",
        limits=[
            "Three facts: f and the cosine are high or low together, and the raw entropy is then low or high.",
            "Whether other runs take the same course: one seed, one order of the data.",
        ],
        figure=figure,
        table=seen,
        reading=_reading(seen, seen["steps_taken"].nunique()),
    )


def draw_map(figure: Figure, axes: Axes, drawn: Map, seen: pd.DataFrame, sites: Sequence[str]) -> str:
    """One map, first layer at the bottom; returns its message."""
    grid = seen.pivot_table(index="site", columns="steps_taken", values=drawn.column, dropna=False).reindex(sites)
    cells = grid.to_numpy(dtype=float)
    high = drawn.high if drawn.high is not None else max(float(np.nanmax(cells)), 1e-6)
    low = min(drawn.low, float(np.nanmin(cells)))
    shown = axes.imshow(
        cells, origin="lower", aspect="auto", interpolation="nearest", cmap=_COLOUR_MAP, vmin=low, vmax=high
    )
    axes.grid(visible=False)
    bar = figure.colorbar(shown, ax=axes, pad=0.02, fraction=0.06)
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(labelsize=6)
    bar.set_label(drawn.name)
    if cells.size <= _MOST_NUMBERS and cells.shape[1] <= _MOST_COLUMNS:
        _write_numbers(axes, cells, drawn, (low + high) / 2)
    rows = [i for i in shown_ticks(sites) if sites[i] != FINAL_PRE_NORM or len(sites) <= _MOST_ROWS]
    axes.set_yticks(rows, [tick_name(sites[i], of=()).strip() for i in rows])
    every = -(-cells.shape[1] // _MOST_COLUMNS)
    columns = list(range(cells.shape[1] - 1, -1, -every))[::-1]  # the last observation is always named
    axes.set_xticks(columns, [str(grid.columns[i]) for i in columns])
    axes.set_ylabel("after decoder block")
    return _message(drawn, grid)


def _write_numbers(axes: Axes, cells: np.ndarray, drawn: Map, middle: float) -> None:
    for (row, column), value in np.ndenumerate(cells):
        if value == value:
            ink = "white" if value < middle else "black"
            text = as_text(float(value), drawn.form)
            axes.text(column, row, text, color=ink, ha="center", va="center", fontsize=6)


def _message(drawn: Map, grid: pd.DataFrame) -> str:
    """The change between the first and the last observation, at the site where the last says most."""
    values = grid.iloc[:, -1].dropna()
    if values.empty:
        return f"{drawn.title} has no value at the last observation"
    site = str(values.idxmax() if drawn.tells == "largest" else values.idxmin())
    first, last = float(grid.loc[site].iloc[0]), float(values[site])
    start, end = as_text(first, drawn.form), as_text(last, drawn.form)
    steps = grid.columns
    if len(steps) == 1 or first != first:
        return f"{drawn.title} is {drawn.tells} at {site_name(site)}: {end} after {steps[-1]} steps"
    where = f"at {site_name(site)}, where it ends {drawn.tells} (steps {steps[0]} to {steps[-1]})"
    if start == end:
        return f"{drawn.title} begins and ends at {end} {where}"
    return f"{drawn.title} {'grows' if last > first else 'falls'} from {start} to {end} {where}"


def _reading(seen: pd.DataFrame, n_moments: int) -> list[str]:
    lines = [
        f"A column is an observation of the probe ({n_moments} here, at {seen['position'].iloc[0]}), a row the residual stream "
        "after a decoder block; pre and post: before and after the final norm.",
        "Columns are evenly spaced, whatever the steps between them. The update is taken from the base model, not from the "
        "column before.",
    ]
    if n_moments == 1:
        lines.append(
            "One observation shows no course in time: more with callbacks=full, or every_n_steps of a callback."
        )
    return lines
