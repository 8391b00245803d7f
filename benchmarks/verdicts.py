"""How often are verdicts wrong? Studies whose truth is planted, judged as ``python analyze.py runs=…`` judges them.

    python benchmarks/verdicts.py [--quick] [--draws N] [--jobs N] [--figure FILE]

Each world is a study of hidden states: three dpo runs, the arms of the claims K3 to K6, five draws of random weights, states at
other positions and of unrelated text. A world in which a claim is false may be called "supported" in 5 % of its draws; one in which
it is true has to be in 90 %.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file can be run from anywhere
import tiltmeter.threads  # noqa: F401  before torch, which reads its threads' settings as it is imported

# isort: split
import numpy as np
import torch
from torch import Tensor

from analysis.claims.claim import DRAWN, Bound, Claim, OfTable, Unchanged, Within, read_claims
from analysis.claims.evidence import Arms, Figure, judge_all
from analysis.claims.statistics import Read
from analysis.claims.verdict import REFUTED, SAME, SUPPORTED
from analysis.open.studies import DPO
from analysis.report.style import COLOURS, house_style, new_figure, png_bytes, set_titles
from tiltmeter.geometry.update_models import UpdateModels
from tiltmeter.states.capture import HiddenStates, ReadPoint
from tiltmeter.states.state_pair import StatePair
from tiltmeter.stats.among_random import ABOVE, among_random
from tiltmeter.stats.arms import Arm, arm_difference, arm_interval
from tiltmeter.stats.nulls import signal_rank_correlated
from tiltmeter.stats.proportions import share_interval

CLAIMS = Path(__file__).resolve().parent.parent / "conf" / "claims" / "dsteer.yaml"
JUDGED = ("K3", "K4", "K5", "K6")
SITES = ("layer_00", "layer_01", "layer_02")
N_PROMPTS, D_MODEL, N_TYPES, NOISE = 64, 64, 12, 0.25
TRAINED = ("sft_chosen", "dpo_shuffled", "lm_continued")


class Drawer:
    """Random numbers of one study, with what all its arms share: prompts, the base's states and the types of content tokens."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.base = {where: self.normal(N_PROMPTS, D_MODEL) for where in ("prompt_last", "content", "unrelated")}
        self.types = torch.randint(0, N_TYPES, (N_PROMPTS,), generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def unit(self) -> Tensor:
        v = self.normal(D_MODEL)
        return v / v.norm()

    def noise(self, scale: float = NOISE) -> Tensor:
        """Rows of mean length ``scale``."""
        return scale * self.normal(N_PROMPTS, D_MODEL) / math.sqrt(D_MODEL)


Updates = dict[str, Tensor]
"""δ at ``prompt_last``, ``content`` and in ``unrelated`` text."""
Plan = Callable[[Drawer], Callable[[str], Updates]]
"""A world: draws what its study shares, and gives the updates of a run of an arm."""


def everywhere(make: Callable[[], Tensor]) -> Updates:
    return {where: make() for where in ("prompt_last", "content", "unrelated")}


def no_arm_but_dpo(drawer: Drawer, dpo: Callable[[], Updates]) -> Callable[[str], Updates]:
    """Controls move states at random, as far as dpo's noise does."""
    return lambda arm: dpo() if arm == DPO else everywhere(drawer.noise)


def isotropic(drawer: Drawer) -> Callable[[str], Updates]:
    return lambda arm: everywhere(drawer.noise)


def correlated(drawer: Drawer) -> Callable[[str], Updates]:
    scales = torch.logspace(0, -3, D_MODEL, dtype=torch.float64)
    return lambda arm: everywhere(lambda: drawer.normal(N_PROMPTS, D_MODEL) * scales)


def shift(drawer: Drawer) -> Callable[[str], Updates]:
    v = drawer.unit()
    return no_arm_but_dpo(drawer, lambda: everywhere(lambda: v + drawer.noise()))


def rank_one(drawer: Drawer) -> Callable[[str], Updates]:
    """α(x) v: one direction, of another length in each prompt."""
    v = drawer.unit()
    lengths = {where: 2.5 + drawer.normal(N_PROMPTS, 1) for where in ("prompt_last", "content", "unrelated")}
    noise = 0.1
    return no_arm_but_dpo(drawer, lambda: {w: a * v + drawer.noise(noise) for w, a in lengths.items()})


def shift_and_rank(drawer: Drawer, *, k: int) -> Callable[[str], Updates]:
    v, directions = drawer.unit(), torch.stack([drawer.unit() for _ in range(k)])
    scores = 1.5 * drawer.normal(N_PROMPTS, k)
    return no_arm_but_dpo(drawer, lambda: everywhere(lambda: v + scores @ directions + drawer.noise()))


def outlier_dims(drawer: Drawer, *, n: int) -> Callable[[str], Updates]:
    """Training moves a few dimensions that are large in the base anyhow, and nothing else alike."""
    dims = torch.randperm(D_MODEL, generator=drawer.generator)[:n]
    for states in drawer.base.values():
        states[:, dims] += 30.0

    def dpo() -> Updates:
        found = everywhere(drawer.noise)
        for rows in found.values():
            rows[:, dims] += 2.0
        return found

    return no_arm_but_dpo(drawer, dpo)


def token_types(drawer: Drawer) -> Callable[[str], Updates]:
    """Each token type has a shift of its own; all prompts end in one type."""
    shifts = torch.stack([drawer.unit() for _ in range(N_TYPES)])

    def dpo() -> Updates:
        of_content = shifts[drawer.types] + drawer.noise()
        return {
            "prompt_last": shifts[0] + drawer.noise(),
            "content": of_content,
            "unrelated": shifts[drawer.types.roll(1)] + drawer.noise(),
        }

    return no_arm_but_dpo(drawer, dpo)


def affine(drawer: Drawer) -> Callable[[str], Updates]:
    w, b = drawer.normal(D_MODEL, 4) @ drawer.normal(4, D_MODEL) / D_MODEL, drawer.unit()
    return no_arm_but_dpo(drawer, lambda: {w_: h @ w + b + drawer.noise() for w_, h in drawer.base.items()})


def as_sft(drawer: Drawer) -> Callable[[str], Updates]:
    """Every kind of training gives the same shift, up to its seed."""
    v = drawer.unit()

    def run(arm: str) -> Updates:
        if arm in DRAWN:
            return everywhere(drawer.noise)
        own = v + drawer.noise(0.15)[0]
        scale = NOISE * (1 + 0.2 * float(drawer.normal(1)))
        return everywhere(lambda: own + drawer.noise(scale))

    return run


def as_random_weights(drawer: Drawer) -> Callable[[str], Updates]:
    """Any change of the weights gives a shift; dpo's is one of them."""

    def run(arm: str) -> Updates:
        own, scale = drawer.unit(), NOISE * (1 + 0.2 * float(drawer.normal(1)))
        return everywhere(lambda: own + drawer.noise(scale))

    return run


def collapse(drawer: Drawer) -> Callable[[str], Updates]:
    """States fall together along most directions: their entropy falls."""
    keep = 0.3 + 0.7 * (torch.arange(D_MODEL) < 8).double()

    def dpo() -> Updates:
        return {where: h * (keep - 1) + drawer.noise(0.05) for where, h in drawer.base.items()}

    return no_arm_but_dpo(drawer, dpo)


class World(NamedTuple):
    """A planted study, and which claims are true in it."""

    plan: Plan
    true: Sequence[str] = ()
    open: Sequence[str] = ()
    """Claims about which the world says nothing: neither true nor false."""


WORLDS: dict[str, World] = {
    "isotropic noise": World(isotropic),
    "correlated noise": World(correlated),
    "pure shift": World(shift, true=["K3", "K4"]),
    "α(x) v": World(rank_one, true=["K5"], open=["K3", "K4", "K6"]),
    "shift + rank 1": World(partial(shift_and_rank, k=1), open=["K3", "K6"]),
    "shift + rank 4": World(partial(shift_and_rank, k=4), open=["K3", "K6"]),
    "one outlier dimension": World(partial(outlier_dims, n=1), open=["K3"]),
    "four outlier dimensions": World(partial(outlier_dims, n=4), open=["K3"]),
    "shift of each token type": World(token_types, open=["K3"]),
    "affine": World(affine, open=["K6"]),
    "dpo = sft + seed": World(as_sft),
    "dpo = random weights": World(as_random_weights),
    "collapse of entropy": World(collapse, true=["K6"]),
}


def read_of(drawer: Drawer, updates: Updates) -> Read:
    """The states of one run, at the upper sites; the lower one does not move."""
    clusters = [f"prompt {i}" for i in range(N_PROMPTS)]
    index, sides = torch.arange(N_PROMPTS), torch.zeros(N_PROMPTS, dtype=torch.int64)
    content_ids = dict(zip(clusters, drawer.types.tolist(), strict=True))

    def states(where: Sequence[str], named: Sequence[str]) -> StatePair:
        readings: list[dict[ReadPoint, HiddenStates]] = [{}, {}]
        for place, position in zip(where, named, strict=True):
            for site in SITES:
                moved = drawer.base[place] + (updates[place] if site == SITES[-1] else 0.0)
                for reading, rows in zip(readings, (drawer.base[place], moved), strict=True):
                    reading[ReadPoint(site, position)] = HiddenStates(rows.float(), index, sides)  # type: ignore[arg-type]
        return StatePair(*readings, pair_ids=clusters, clusters=clusters)

    own = states(["prompt_last", "content"], ["prompt_last", "content"])
    return Read(own, content_ids=content_ids, unrelated=states(["unrelated"], ["prompt_last"]))


def study_of(name: str, seed: int) -> Arms:
    """One draw of a world."""
    drawer = Drawer(seed)
    run = WORLDS[name].plan(drawer)
    updates = {DPO: [run(DPO) for _ in range(3)]}
    updates |= {arm: [run(arm)] for arm in TRAINED} | {arm: [run(arm) for _ in range(5)] for arm in DRAWN}
    gains = [Figure(affine_gain(drawer, found["prompt_last"])) for found in updates[DPO]]

    def tables(arm: str, asked: OfTable) -> Sequence[Figure] | str:
        return gains if asked.table == "update_models" else "not planted"

    return Arms({arm: [read_of(drawer, found) for found in runs] for arm, runs in updates.items()}, tables)


def affine_gain(drawer: Drawer, update: Tensor) -> float:
    """R² of an affine function of the state less that of a constant, cross-validated (control C17)."""
    base = drawer.base["prompt_last"]
    models = UpdateModels(D_MODEL, n_folds=5, seed=0)
    models.update(base, base + update, [str(i) for i in range(N_PROMPTS)])
    scores = {score.model: score.r_squared for score in models.scores(ranks=[1])}
    return scores["affine"] - scores["constant"]


def verdicts_of(asked: tuple[str, int]) -> dict[str, str]:
    """Verdict on each claim in one draw of a world."""
    torch.set_num_threads(1)
    claims = [claim for claim in read_claims(CLAIMS) if claim.key in JUDGED]
    return {verdict.claim.key: verdict.kind for verdict in judge_all(claims, study_of(*asked))}


def steering_rates(n_draws: int) -> dict[str, float]:
    """How often a vector is called above 99 random ones whose effects it is one of, or lies 2 or 5 standard deviations above."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for above in (0.0, 2.0, 5.0):
        hits = 0
        for _ in range(n_draws):
            effects = torch.randn(100, generator=generator, dtype=torch.float64)
            of_prompts = 0.3 * torch.randn(64, 100, generator=generator, dtype=torch.float64) + effects
            of_prompts[:, 0] += above
            without = (of_prompts.sum(0) - of_prompts) / 63
            values = torch.cat([of_prompts.mean(0, keepdim=True), without])
            hits += among_random(values[:, 0], values[:, 1:]).verdict == ABOVE
        found[f"vector {above:g} σ above random ones"] = hits / n_draws
    return found


LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)


def interval_coverage(n_draws: int, level: float = 0.95) -> dict[str, float]:
    """Share of draws in which intervals hold the truth: of the mean of an arm, and of the difference of two arms."""
    generator = torch.Generator().manual_seed(1)
    held = {"mean of three runs": 0, "difference, three runs and one": 0, "difference, three runs and three": 0}
    n, between, within = 64, 0.3, 1.0

    def arm(n_runs: int) -> Arm:
        prompts = within * torch.randn(n, 1, generator=generator, dtype=torch.float64)
        of_runs = between * torch.randn(1, n_runs, generator=generator, dtype=torch.float64)
        values = prompts + of_runs + 0.2 * torch.randn(n, n_runs, generator=generator, dtype=torch.float64)
        return Arm(torch.cat([values.mean(0, keepdim=True), (values.sum(0) - values) / (n - 1)]))

    for _ in range(n_draws):
        low, high = arm_interval(arm(3), level=level)[1:]
        held["mean of three runs"] += low <= 0 <= high
        for m, name in ((1, "difference, three runs and one"), (3, "difference, three runs and three")):
            low, high = arm_difference(arm(3), arm(m), level=level).interval[1:]
            held[name] += low <= 0 <= high
    return {name: count / n_draws for name, count in held.items()}


def draw_calibration(path: Path, n_draws: int) -> None:
    """Draw how often intervals hold the truth, against the level that they say."""
    found = {level: interval_coverage(n_draws, level) for level in LEVELS}
    colours = [COLOURS[name] for name in ("policy_dark", "policy", "chosen")]
    with house_style():
        figure, (axes,) = new_figure(1)
        axes.plot([0.45, 1], [0.45, 1], color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)))
        for name, colour in zip(found[LEVELS[0]], colours, strict=True):
            axes.plot(LEVELS, [found[level][name] for level in LEVELS], "o-", color=colour, label=name)
        axes.set_xlabel("level that an interval says")
        axes.set_ylabel("share that hold the truth")
        axes.set_ylim(0.2, 1.02)
        axes.legend(frameon=False, loc="lower right")
        least = min(found[0.95].values())
        set_titles(
            figure,
            [axes],
            [f"95\u00a0% intervals of arms hold the truth in {100 * least:.0f}\u00a0% of {n_draws} sets at least"],
        )
        path.write_bytes(png_bytes(figure))


def belief_rates(n_draws: int) -> dict[str, float]:
    """How often three figures of three runs are called unchanged (K11), by how far one of them has truly changed.

    Standard errors are an eighth of the margin, figures vary between runs by a tenth of it.
    """
    rng = np.random.default_rng(2)
    asked = [OfTable(name, "x", {}, within=Within(0.0, 1.0)) for name in "abc"]
    claim = Claim("K11", "unchanged", Unchanged(tuple(asked)), Bound("at_most", 1.0), {}, ())
    found = {}
    for truth in (1.0, 0.5, 0.0):
        hits, error = 0, 1 / 8
        for _ in range(n_draws):
            values = rng.normal(0, math.hypot(error, 0.1), (3, 3)) + np.array([truth, 0, 0])[:, None]
            reach = dict(zip("abc", abs(values) + 1.96 * error, strict=True))
            arms = Arms({}, lambda arm, figure, reach=reach: [Figure(float(x)) for x in reach[figure.table]])
            hits += judge_all([claim], arms)[0].kind == SUPPORTED
        found[f"a change of {truth:g} of its margin"] = hits / n_draws
    return found


def rank_rate(asked: tuple[int, float, int]) -> float:
    """Share of draws in which a planted rank is found exactly, N = 512, d = 256.

    Args:
        asked: rank, standard deviation along each planted direction over that of the noise in every dimension, draws.
    """
    torch.set_num_threads(1)
    rank, ratio, n_draws = asked
    generator, found = torch.Generator().manual_seed(rank), 0
    for _ in range(n_draws):
        directions = torch.linalg.qr(torch.randn(256, rank, generator=generator, dtype=torch.float64)).Q
        scores = ratio * torch.randn(512, rank, generator=generator, dtype=torch.float64)
        noise = torch.randn(512, 256, generator=generator, dtype=torch.float64)
        found += signal_rank_correlated(noise + scores @ directions.T) == rank
    return found / n_draws


def print_ranks(n_draws: int, processes: ProcessPoolExecutor) -> None:
    """Table of :func:`rank_rate`."""
    ranks, ratios = (1, 2, 4, 8), (1.5, 2.0, 3.0, 5.0)
    print(
        f"\nplanted rank found exactly, {n_draws} draws each, by standard deviation of the signal over that of the noise"
    )
    print(f"{'rank':>6}" + "".join(f"{ratio:>8g}" for ratio in ratios))
    for rank in ranks:
        rates = processes.map(rank_rate, [(rank, ratio, n_draws) for ratio in ratios])
        print(f"{rank:>6}" + "".join(f"{rate:>8.3f}" for rate in rates), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of rates, and the figures that RESULTS.md keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200, help="of each world")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="20 draws")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="only draw how often intervals hold the truth, as PNG"
    )
    options = parser.parse_args(argv)
    n = 20 if options.quick else options.draws
    if options.figure is not None:
        draw_calibration(options.figure, 10 * n)
        return
    print(
        f"{n} draws a world; share of them called “supported” (95 % interval), and the most frequent verdict otherwise\n"
    )
    print(f"{'world':28}" + "".join(f"{key:>34}" for key in JUDGED))
    false_positives, detections = [0.0], [1.0]
    with ProcessPoolExecutor(options.jobs) as processes:
        for name, world in WORLDS.items():
            found = list(processes.map(verdicts_of, [(name, seed) for seed in range(n)], chunksize=5))
            cells = []
            for key in JUDGED:
                kinds = [verdicts[key] for verdicts in found]
                supported = kinds.count(SUPPORTED) / n
                if key in world.true:
                    detections.append(supported)
                elif key not in world.open:
                    false_positives.append(supported)
                names, counts = np.unique([k for k in kinds if k != SUPPORTED] or ["–"], return_counts=True)
                low, high = share_interval([float(k == SUPPORTED) for k in kinds], [str(i) for i in range(n)])[1:]
                mark = "✓" if key in world.true else "?" if key in world.open else "✗"
                short = {SAME: "like control", REFUTED: "refuted"}.get(
                    str(names[counts.argmax()]), str(names[counts.argmax()])
                )
                cells.append(f"{mark} {supported:.2f} ({low:.2f}–{high:.2f}) {short}")
            print(f"{name:28}" + "".join(f"{cell:>34}" for cell in cells), flush=True)
        print("\n✓ true there, ✗ false there, ? the world doesn't say")
        print_ranks(n, processes)
    print()
    steering = steering_rates(10 * n)
    rates = list(steering.items())
    false_positives.append(rates[0][1])
    detections.append(rates[-1][1])
    for name, rate in rates:
        print(f"{name:44} above random in {rate:.3f}")
    belief = list(belief_rates(10 * n).items())
    false_positives.append(belief[0][1])
    detections.append(belief[-1][1])
    for name, rate in belief:
        print(f"{name:44} called unchanged in {rate:.3f}")
    coverage = interval_coverage(10 * n)
    for name, rate in coverage.items():
        print(f"{name:44} interval holds the truth in {rate:.3f}")
    print(
        f"RESULT false_positive_max={max(false_positives):.3f} detection_min={min(detections):.3f} "
        f"coverage_min={min(coverage.values()):.3f}"
    )


if __name__ == "__main__":
    main()
