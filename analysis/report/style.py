"""House style of figures: one message each, said in the title; fixed colour-blind-safe colours; labels on the lines."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullFormatter
from scipy.optimize import isotonic_regression

from tiltmeter.files import write_atomically

COLOURS: Mapping[str, str] = {
    "base": "#4d4d4d",
    "policy": "#0072b2",
    "policy_dark": "#00304d",
    "policy_light": "#8b93d6",
    "chosen": "#009e73",
    "rejected": "#d55e00",
    "dpo": "#0072b2",
    "sft_chosen": "#e69f00",
    "dpo_shuffled": "#cc79a7",
    "dpo_swapped": "#56b4e9",
    "dpo_random_pairs": "#999933",
    "lm_continued": "#44aa99",
    "constant_vector": "#882255",
    "constant_vector_shuffled": "#c9a227",
    "fsrl": "#332288",
    "random_update": "#767676",
    "null": "#b3b3b3",
    "mark": "#767676",
}
"""Model or control → its colour, the same in every figure (Okabe and Ito; grey for what carries no claim)."""

STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.0,
    "axes.titlesize": 7.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 7.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.0,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.0,
    "figure.facecolor": "white",
    "text.parse_math": False,  # names of figures may hold anything
    "pdf.fonttype": 42,
}
WIDTH_CM = 8.0
"""One column of a two-column paper."""
_DPI = 200
_TITLE_CHARACTERS = 50
"""In a line, at most."""
_LABEL_POINTS = 9.5
"""Least distance of two labels."""
_LABEL_MARGIN = 0.03
"""Margin of labels from the axes' ends, or the upper half of one stands in the title."""


class EndLabel(NamedTuple):
    """A word at the right end of a line."""

    y: float
    text: str
    colour: str


def new_figure(n_panels: int, *, panel_height_cm: float = 5.2) -> tuple[Figure, list[Axes]]:
    """A figure one column wide with panels below each other; call inside :func:`house_style`."""
    size = (WIDTH_CM / 2.54, n_panels * panel_height_cm / 2.54)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.07)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(n_panels, 1, squeeze=False)[:, 0]
    for panel in axes:
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    return figure, list(axes)


def house_style() -> Any:
    """Context manager: everything drawn and saved inside looks like the house."""
    options: Any = dict(STYLE)
    return matplotlib.rc_context(options)


def set_titles(figure: Figure, axes: Sequence[Axes], sentences: Sequence[str]) -> None:
    """Each panel's message, flush with the figure's left edge and broken to its width; the last thing done to a figure."""
    wrapped = [_wrapped(figure, sentence) for sentence in sentences]
    for panel, text in zip(axes, wrapped, strict=True):
        panel.set_title("\n".join("x" for _ in text.splitlines()), linespacing=1.25)
    figure.draw_without_rendering()  # the layout makes room for the lines, but for no title that is wider than its axes
    figure.set_layout_engine("none")
    for panel, text in zip(axes, wrapped, strict=True):
        box = panel.get_position()
        panel.set_title(text, linespacing=1.25, x=(0.01 - box.x0) / box.width)


def _wrapped(figure: Figure, sentence: str) -> str:
    """Broken into lines that the figure is wide enough for, however wide their letters are."""
    look = {"fontsize": matplotlib.rcParams["axes.titlesize"], "weight": matplotlib.rcParams["axes.titleweight"]}
    trial = figure.text(0, 0, "", **look)
    for characters in range(_TITLE_CHARACTERS, _TITLE_CHARACTERS // 2, -1):
        trial.set_text(textwrap.fill(sentence, characters))
        if trial.get_window_extent().width <= 0.98 * figure.bbox.width:
            break
    trial.remove()
    return trial.get_text()


def use_log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers; matplotlib's powers of ten are formulas, which the house style leaves as text."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def mark_level(axes: Axes, y: float) -> None:
    """A dashed line at a value that means something, as far as the data go."""
    axes.plot(axes.get_xlim(), (y, y), color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)


def label_ends(axes: Axes, labels: Sequence[EndLabel], *, room: float = 0.24) -> None:
    """Write labels to the right of where the lines end, moved apart where they would touch.

    Args:
        axes: everything must be drawn already, and the limits span the data: they are fixed here.
        labels: height in data units, text and colour.
        room: share of the width to make free on the right.
    """
    left, right = axes.get_xlim()
    low, high = axes.get_ylim()
    axes.set_xticks([tick for tick in axes.get_xticks() if left <= tick <= right])
    axes.spines["bottom"].set_bounds(left, right)
    scale = axes.get_xaxis().get_transform()
    ends = scale.transform([left, right])
    axes.set_xlim(left, float(scale.inverted().transform(ends[0] + (ends[1] - ends[0]) / (1 - room))))
    axes.set_ylim(low, high)
    to_axes = axes.transData + axes.transAxes.inverted()  # of any scale
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # in points; the layout to come changes it little
    heights = spread([float(to_axes.transform((left, label.y))[1]) for label in labels], gap=_LABEL_POINTS / height)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    for label, height in zip(labels, heights, strict=True):
        at = (1 - room + 0.02, height)
        text = axes.text(*at, label.text, color=label.colour, transform=axes.transAxes, va="center", bbox=behind)
        text.set_fontweight("bold")


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Move heights apart to at least ``gap``, in their order, with as little movement as needed, just inside 0 … 1.

    >>> [round(y, 2) for y in spread([0.50, 0.52, 0.9], gap=0.1)]
    [0.46, 0.56, 0.9]
    """
    if not heights:
        return []
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(order))
    free = isotonic_regression(np.asarray(heights)[order] - steps).x  # least squares under "above stays above"
    placed = np.empty(len(order))
    most = max(_LABEL_MARGIN, 1.0 - _LABEL_MARGIN - steps[-1])
    placed[order] = np.clip(free, _LABEL_MARGIN, most) + steps
    return [float(y) for y in placed]


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file in memory (200 dpi)."""
    file = io.BytesIO()
    with house_style():
        figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.png (200 dpi) and NAME.pdf, each whole or not at all."""
    paths = [folder / f"{name}.png", folder / f"{name}.pdf"]
    with house_style():
        for path in paths:
            metadata = {"CreationDate": None} if path.suffix == ".pdf" else {}
            write_atomically(path, lambda temporary, m=metadata: figure.savefig(temporary, dpi=_DPI, metadata=m))  # type: ignore[misc]
    return paths
