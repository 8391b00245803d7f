"""How often do intervals hold the truth, and how often is a random vector called unusual? Simulated, new beside old.

    python benchmarks/coverage.py              # 1,000 sets a world, about ten minutes; writes docs/images/coverage.png
    python benchmarks/coverage.py --quick      # 100 sets of a few worlds, under a minute, no figure

A world is a population with a known truth. Each set is drawn anew, its interval computed by the code that reports use, and the
share of intervals that hold the truth is the real coverage. Beside it stands the percentile bootstrap over prompts that reports
used before; and beside the judgement among random vectors the one that took the mean of five of them as known.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import common  # before torch, which reads its threads' settings as it is imported

# isort: split
import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from analysis.report.style import COLOURS, house_style, new_figure, set_titles
from tiltmeter.geometry.consistency import mean_cosine_intervals, shift_shares_of_gram
from tiltmeter.geometry.energy_distance import energy_kernel
from tiltmeter.geometry.spectra import leading_energies_of_gram
from tiltmeter.stats.among_random import SAME, among_random
from tiltmeter.stats.jackknife import (
    COSINE,
    LINEAR,
    SHARE,
    SQUARE,
    Interval,
    Scale,
    cluster_mean_interval,
    jackknife_interval,
    jackknife_variance,
    without_each,
)
from tiltmeter.stats.proportions import share_interval

NOMINAL = (0.5, 0.8, 0.9, 0.95, 0.99)
D_MODEL = 32
FIGURE = common.ROOT / "docs" / "images" / "coverage.png"
_N_RESAMPLES = 1000
_N_FOR_TRUTH = 1000


class Drawn(NamedTuple):
    """One set of a world."""

    statistic: Callable[[Tensor], Tensor]
    """From how much each row counts, for several weightings, to the figure."""
    clusters: Sequence[str]
    interval: Callable[[float], Interval]
    """The interval of reports, by level."""


class World(NamedTuple):
    """A population.

    Args:
        name: what is estimated.
        draw: one set, from its number of prompts and a seed.
        truth: by number of prompts; None: the mean of the figure over 1,000 more sets.
        sizes: numbers of prompts.
        most: coverage above which an interval is needlessly wide.
    """

    name: str
    draw: Callable[[int, int], Drawn]
    truth: Callable[[int], float] | None = None
    sizes: tuple[int, ...] = (16, 64, 200)
    most: float = 0.97

    def true_value(self, n: int) -> float:
        """What intervals of n prompts should hold."""
        if self.truth is not None:
            return self.truth(n)
        ones, total = None, 0.0
        for seed in range(_N_FOR_TRUTH):
            drawn = self.draw(n, 10**8 + seed)
            ones = torch.ones(1, len(drawn.clusters), dtype=torch.float64) if ones is None else ones
            total += float(drawn.statistic(ones))
        return total / _N_FOR_TRUTH


def shifted_rows(n: int, f: float, seed: int) -> Tensor:
    """Rows of which the share f of energy is one constant shift."""
    noise = torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / D_MODEL**0.5
    noise[:, 0] += (f / (1 - f)) ** 0.5
    return noise


def _names(n: int, each: int = 1) -> list[str]:
    return [str(i // each) for i in range(n * each)]


def _jackknifed(
    statistic: Callable[[Tensor], Tensor], n: int, *, second_order: bool = False, scale: Scale = LINEAR
) -> Drawn:
    names = _names(n)
    return Drawn(
        statistic,
        names,
        lambda level: jackknife_interval(statistic, names, level=level, second_order=second_order, scale=scale),
    )


def _shift_share(f: float) -> World:
    def draw(n: int, seed: int) -> Drawn:
        x = shifted_rows(n, f, seed)
        return _jackknifed(shift_shares_of_gram(x @ x.T), n, second_order=True, scale=SHARE)

    return World(f"shift share f = {f:g}", draw, lambda n: f + (1 - f) / n)


def _first_energy(n: int, seed: int) -> Drawn:
    x = shifted_rows(n, 0.6, seed)
    both = leading_energies_of_gram(x @ x.T)
    return _jackknifed(lambda w: both(w)[:, 0], n, scale=SHARE)


def _length_of_mean(n: int, seed: int) -> Drawn:
    x = shifted_rows(n, 0.5, seed)
    return _jackknifed(lambda w: (w @ x / w.sum(1, keepdim=True)).norm(dim=1), n, second_order=True, scale=SQUARE)


def _cosine(n: int, seed: int) -> Drawn:
    """Mean leave-one-out cosine with v*; the weighted figure stands in the file that is measured."""
    x, names = shifted_rows(n, 0.5, seed), _names(n)
    gram = x @ x.T
    squares = gram.diagonal()

    def statistic(w: Tensor) -> Tensor:
        sums = w @ gram
        others = (sums * w).sum(1, keepdim=True) - w * (2 * sums - squares)
        return (w * (sums - w * squares) / others.clamp(min=0).sqrt() / squares.sqrt()).sum(1) / w.sum(1)

    return Drawn(
        statistic, names, lambda level: mean_cosine_intervals(x, names, n_splits=2, level=level)["leave_one_out"]
    )


def _cosine_of_means(n: int, seed: int) -> Drawn:
    x, y = shifted_rows(n, 0.5, seed), shifted_rows(n, 0.5, seed + 10**7)
    y[:, 1] += 0.5
    return _jackknifed(lambda w: torch.cosine_similarity(w @ x, w @ y), n, second_order=True, scale=COSINE)


def _distance_left(n: int, seed: int) -> Drawn:
    x, moved, y = (shifted_rows(n, f, seed + i * 10**7) for i, f in enumerate((0.0, 0.3, 0.0)))
    near, far = energy_kernel(moved, y), energy_kernel(moved + 0.5, x)
    return _jackknifed(lambda w: ((w @ near) * w).sum(1) / ((w @ far) * w).sum(1), n)


def _recovery(n: int, seed: int) -> Drawn:
    rng = np.random.default_rng(seed)
    start = torch.from_numpy(rng.uniform(1, 5, n))
    left = start * torch.from_numpy(rng.normal(0.6, 0.2, n))
    return _jackknifed(lambda w: 1 - (w @ left) / (w @ start), n)


def _mean(n: int, seed: int) -> Drawn:
    x = np.random.default_rng(seed).normal(3, 2, n)
    found = _jackknifed(lambda w: w @ torch.from_numpy(x) / w.sum(1), n)
    return found._replace(interval=lambda level: cluster_mean_interval(x.tolist(), _names(n), level=level))


def _share(p: float, *, each: int = 1) -> World:
    """Answers to a prompt, several of them alike: each prompt's own share is of a beta distribution where there are several."""

    def draw(n: int, seed: int) -> Drawn:
        rng = np.random.default_rng(seed)
        own = np.repeat(rng.beta(2 * p, 2 * (1 - p), n), each) if each > 1 else p
        x, names = (rng.random(n * each) < own).astype(float), _names(n, each)
        exact = torch.from_numpy(x)
        return Drawn(
            lambda w: w @ exact / w.sum(1), names, lambda level: share_interval(x.tolist(), names, level=level)
        )

    sizes = (16, 64) if each > 1 else (8, 16, 64, 128)
    return World(f"share p = {p:g}" + (f", {each} a prompt" if each > 1 else ""), draw, lambda n: p, sizes, 1.0)


WORLDS = (
    *(_shift_share(f) for f in (0.0, 0.02, 0.08, 0.5, 0.9)),
    World("first direction’s energy ρ₁", _first_energy),
    World("length of a mean", _length_of_mean),
    World("mean cosine with v*, leave-one-out", _cosine),
    World("cosine of two means", _cosine_of_means),
    World("distance left between clouds", _distance_left),
    World("recovery R", _recovery, lambda n: 0.4),
    World("mean", _mean, lambda n: 3.0),
    *(_share(p) for p in (0.5, 0.9, 0.98, 1.0)),
    _share(0.7, each=4),
)


def percentile_interval(drawn: Drawn, seed: int) -> Callable[[float], Interval]:
    """The old interval: quantiles over resamples of whole prompts."""
    names, index = np.unique(np.asarray(drawn.clusters), return_inverse=True)
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), _N_RESAMPLES)
    figures = drawn.statistic(torch.from_numpy(counts[:, index].astype(float))).numpy()
    value = float(drawn.statistic(torch.ones(1, len(index), dtype=torch.float64)))

    def interval(level: float) -> Interval:
        low, high = np.nanquantile(figures, [(1 - level) / 2, (1 + level) / 2])
        return Interval(value, float(low), float(high))

    return interval


def real_coverage(
    world: World, n: int, *, n_sets: int, levels: Sequence[float] = (0.95,), old: bool = False
) -> list[float]:
    """Share of sets whose interval holds the truth, by nominal level.

    Raises:
        AssertionError: an interval of reports that doesn't hold its own estimate, or is of width 0.
    """
    truth, hits = world.true_value(n), np.zeros(len(levels))
    for seed in range(n_sets):
        drawn = world.draw(n, seed)
        interval_at = percentile_interval(drawn, seed) if old else drawn.interval
        for i, level in enumerate(levels):
            value, low, high = interval_at(level)
            assert old or (low <= value <= high and low < high), f"{world.name}, set {seed}: {value} in {low} … {high}"
            hits[i] += low - 1e-12 <= truth <= high + 1e-12
    return (hits / n_sets).tolist()


def vector_figures(
    rng: np.random.Generator, n_vectors: int, *, spread: np.ndarray | float, n_prompts: int = 32
) -> Tensor:
    """A figure of every vector on all prompts and without each of them, a column a vector.

    A prompt adds the same to all vectors, a vector the same to all prompts (``spread``), and chance something to each.
    """
    by_prompt = 3 * rng.normal(size=(n_prompts, 1)) + rng.normal(size=(n_prompts, n_vectors)) + spread
    kept = without_each(_names(n_prompts))
    return kept @ torch.from_numpy(by_prompt) / kept.sum(1, keepdim=True)


def not_called_unusual(*, n_sets: int, levels: Sequence[float], old: bool = False) -> list[float]:
    """Share of random vectors that are called neither above nor below others, by nominal level.

    Their effects differ as much from vector to vector as from prompt to prompt. Old: the interval over prompts of the vector
    less the mean of five others.
    """
    rng, kept = np.random.default_rng(0), np.zeros(len(levels))
    for _ in range(n_sets):
        n_random = 5 if old else 20
        figures = vector_figures(rng, n_random + 1, spread=rng.normal(size=n_random + 1))
        for i, level in enumerate(levels):
            if old:
                low, high = _over_prompts(figures[:, 0] - figures[:, 1:].mean(1), level)
                kept[i] += low <= 0 <= high
            else:
                kept[i] += among_random(figures[:, 0], figures[:, 1:], level=level).verdict == SAME
    return (kept / n_sets).tolist()


def _over_prompts(difference: Tensor, level: float) -> tuple[float, float]:
    n = len(difference) - 1
    reach = float(stdtrit(n - 1, (1 + level) / 2)) * float(jackknife_variance(difference[1:])) ** 0.5
    return float(difference[0]) - reach, float(difference[0]) + reach


_SHOWN = (
    ("shift share f = 0.02", 64),
    ("shift share f = 0.5", 64),
    ("share p = 0.9", 8),
    ("first direction’s energy ρ₁", 64),
    ("cosine of two means", 16),
)


def draw_curves(n_sets: int, path: Path) -> None:
    """Real against nominal coverage, new beside old, for five figures and for random vectors among others."""
    by_name = {world.name: world for world in WORLDS}
    panels = [
        (
            f"{name}, {n} prompts",
            *(real_coverage(by_name[name], n, n_sets=n_sets, levels=NOMINAL, old=old) for old in (False, True)),
        )
        for name, n in _SHOWN
    ]
    judged = (not_called_unusual(n_sets=2 * n_sets, levels=NOMINAL, old=old) for old in (False, True))
    panels.append(("random vector not called unusual", *judged))
    with house_style():
        figure, axes = new_figure(len(panels), panel_height_cm=4.4)
        for panel, (_, new, old) in zip(axes, panels, strict=True):
            panel.plot([0.4, 1], [0.4, 1], color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)))
            panel.plot(NOMINAL, old, color=COLOURS["rejected"], marker="x", label="percentile bootstrap over prompts")
            panel.plot(NOMINAL, new, color=COLOURS["policy"], marker="o", label="what reports use")
            panel.set(xlim=(0.45, 1.0), ylim=(-0.03, 1.05), ylabel="real")
            panel.set_xticks([level for level in NOMINAL if level != 0.95])
        axes[-1].set_xlabel("nominal coverage; dashed: as it should be")
        axes[1].legend(loc="lower right", frameon=False)
        titles = [f"{name}: nominal 95\u00a0% is really {new[3]:.0%}, was {old[3]:.0%}" for name, new, old in panels]
        set_titles(figure, axes, titles)
        figure.savefig(path)
    print(f"\nFigure: {path.relative_to(common.ROOT)}")


def main() -> None:
    """Measure, print, and draw unless quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 sets, one size of each world, no figure")
    parser.add_argument("--sets", type=common.positive, help="sets of each world (default 1,000; 100 with --quick)")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    n_sets = asked.sets or (100 if asked.quick else 1000)
    table, least = [], 1.0
    for world in WORLDS:
        for n in world.sizes[-2:-1] if asked.quick else world.sizes:
            common.progress(f"{world.name}, {n} prompts …")
            (new,) = real_coverage(world, n, n_sets=n_sets)
            (old,) = real_coverage(world, n, n_sets=n_sets, old=True)
            table.append([world.name, str(n), f"{new:.3f}", f"{old:.3f}"])
            least = min(least, new)
    error = math.sqrt(0.95 * 0.05 / n_sets)
    head = ("figure", "prompts", "reports’ interval", "percentile bootstrap")
    common.print_table(
        f"Real coverage of nominal 95 % intervals, {n_sets} sets each, standard error {error:.3f}", head, table
    )
    (judged,), (before,) = (not_called_unusual(n_sets=4 * n_sets, levels=(0.95,), old=old) for old in (False, True))
    print(
        f"\nOne more random vector is called above or below others in {1 - judged:.1%} (nominal at most 5 %); "
        f"with five others’ mean taken as known it was {1 - before:.1%}."
    )
    if not asked.quick:
        draw_curves(n_sets, FIGURE)
    common.print_result(coverage_min=least, random_called_unusual=1 - judged)


if __name__ == "__main__":
    main()
