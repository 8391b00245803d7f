"""The picture of the README, from the tables of two analysed runs: what v* does to text, and what f is beside random weights.

python docs/finding.py RUN [RUN ...]        # each with analysis=all asked; writes docs/images/finding.png
"""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.report.style import COLOURS, house_style, png_bytes

READ = {"prompt_last": "v*", "response_mean": "v*@response_mean"}
"""Position that v* was read at → its name in the tables."""
ROWS = (
    ("recovery_first_token", "prompt_last", "first token"),
    ("recovery", "prompt_last", "whole response"),
    ("recovery", "response_mean", "whole response,\nv* read along it"),
)


SHARES = (("prompt_last", "", "last token\nof the prompt"), ("content", "_content", "content token\nof the prompt"))
"""Position → infix of its columns in geometry.csv, and its name in the picture."""


class Mark(NamedTuple):
    """One value beside its controls."""

    value: float
    low: float
    """Lower end of the controls' range."""
    high: float
    control: float
    """Mean of the controls."""
    filled: bool = True
    base: float = float("nan")


Rows = dict[tuple[str, str], list[Mark]]
"""Run and label → the lines of a row."""


def main() -> None:
    """Draw both panels and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    runs = {folder.parent.name: folder / "report" / "tables" for folder in parser.parse_args().runs}
    recovered = {(run, label): recoveries(at, metric, read) for run, at in runs.items() for metric, read, label in ROWS}
    shares = {(run, label): shift_shares(at, infix) for run, at in runs.items() for _, infix, label in SHARES}
    with house_style():
        figure = Figure(figsize=(17 / 2.54, 8.8 / 2.54), dpi=200, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        first, second = draw(left, recovered, (-1.25, 1.08))
        left.text(0.0, first, "95 % of random vectors", color=COLOURS["mark"], ha="center", va="center")
        left.text(1.08, first, "v*", color=COLOURS["policy"], fontweight="bold", ha="right", va="center")
        left.text(1.08, second, "hollow: text fell apart", color=COLOURS["policy"], ha="right", va="center")
        left.set_xlabel("recovery R: 0 = no nearer to the policy, 1 = the policy")
        first, second = draw(right, shares, (0.0, 1.03))
        right.text(0.87, first, "random weights", color=COLOURS["mark"], ha="right", va="center")
        right.text(1.03, first, "DPO", color=COLOURS["policy"], fontweight="bold", ha="right", va="center")
        right.text(1.03, second, "| the base's own states", color=COLOURS["base"], ha="right", va="center")
        right.set_xlabel("f, share of the update that is one constant shift")
        token, whole = (spread_of(recovered, label) for _, read, label in ROWS if read == "prompt_last")
        title(left, f"v* takes the first token {token} of the way to the policy, the whole response {whole}", 52)
        f, random = (spread_of(shares, SHARES[0][2], field) for field in ("value", "control"))
        title(right, f"f is {f}, and {random} for random weight changes of equal norm", 36)
        Path(__file__).with_name("images").joinpath("finding.png").write_bytes(png_bytes(figure))


def recoveries(tables: Path, metric: str, read: str) -> list[Mark]:
    """R at λ = 1 for each site and direction, beside 95 % of the random vectors of v*'s norm; hollow where text collapsed."""
    effects, sweep, vectors = (
        pd.read_csv(tables / f"{name}.csv") for name in ("steering_effects", "sweep", "steering_vectors")
    )
    own = effects[(effects["vector"] == READ[read]) & (effects["metric"] == "recovery") & (effects["equal"] == "norm")]
    norms = vectors.drop_duplicates(["vector", "site"]).set_index(["vector", "site"])["norm"]
    marks = []
    for row in own.sort_values(["site", "direction"]).itertuples():
        here = sweep[(sweep["metric"] == metric) & (sweep["site"] == row.site) & (sweep["direction"] == row.direction)]
        length = norms[READ[read], row.site] / norms["random", row.site]
        drawn = here[(here["vector"] == "random") & np.isclose(here["lambda"], length, rtol=1e-3)]["value"]
        value = here[(here["vector"] == READ[read]) & (here["lambda"] == 1)]["value"].item()
        low, high = drawn.quantile([0.025, 0.975])
        marks.append(Mark(value, low, high, drawn.mean(), filled=row.verdict != "collapsed"))
    return marks


def shift_shares(tables: Path, infix: str) -> list[Mark]:
    """f by site, beside the range of random weight changes of equal norm, and f of the base's own states."""
    table = pd.read_csv(tables / "geometry.csv")
    names = [f"shift_share{infix}{end}" for end in ("", "_random_low", "_random_high", "_random", "_base")]
    return [Mark(*row, base=base) for *row, base in table[names].to_numpy().tolist()]


def draw(axes: Axes, rows: Rows, limits: tuple[float, float]) -> list[float]:
    """Draw a row for each key, with a line for each mark, runs below each other; returns the height of each run's name."""
    y, runs = 0.0, list(dict.fromkeys(run for run, _ in rows))
    ticks, heads = [], []
    for run in runs:
        heads.append(y)
        axes.text(limits[0], y, run, fontweight="bold", va="center")
        y += 0.55
        for label, marks in ((label, marks) for (of, label), marks in rows.items() if of == run):
            heights = y + np.linspace(0, 0.62, len(marks))
            for height, mark in zip(heights, marks, strict=True):
                axes.plot((mark.low, mark.high), (height, height), color=COLOURS["null"], linewidth=2.2, zorder=2)
                axes.plot(mark.base, height, "|", color=COLOURS["base"], markersize=5, markeredgewidth=1.0, zorder=5)
                face = COLOURS["policy"] if mark.filled else "white"
                axes.plot(
                    mark.value, height, "o", color=COLOURS["policy"], markerfacecolor=face, markersize=3.2, zorder=4
                )
            ticks.append((float(heights.mean()), label))
            y += 1.0
        y += 0.25
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.set(xlim=limits, ylim=(y - 0.25, -0.35))
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    return heads


def spread_of(rows: Rows, row: str, field: str = "value") -> str:
    """Least and largest value, or mean of controls, over the runs' rows of that label, in words."""
    values = [getattr(mark, field) for (_, label), marks in rows.items() if label == row for mark in marks]
    return " to ".join(f"{x:.2f}".replace("0.", ".").replace("-", "−") for x in (min(values), max(values)))


def title(axes: Axes, sentence: str, width: int) -> None:
    """The message of a panel, broken to its width."""
    axes.set_title(textwrap.fill(sentence, width), linespacing=1.25)


if __name__ == "__main__":
    main()
