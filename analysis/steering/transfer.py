"""Does v* of one layer do anything at another? Every site's v* is swept at every site, at one strength, beside random vectors.

v* is estimated on one half of the held-out prompts, all numbers are of the other half, teacher-forced.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analysis.contract import Cost
from analysis.figures.transfer import OWN_LESS_OTHERS, OWN_LESS_RANDOM
from analysis.open.checkpoints import Checkpoints
from analysis.steering.directions import States, split_by_prompt, v_star
from analysis.steering.sweep import check_options
from analysis.steering.teacher_forced import Sums, TeacherForcedSweep
from analysis.steering.vectors import n_drawn
from tiltmeter.errors import UserError
from tiltmeter.geometry.consistency import cosine
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.layers import resolve_sites, site_depth
from tiltmeter.states.positions import Position
from tiltmeter.states.probe_set import ONE_PER_SIDE
from tiltmeter.stats.among_random import AmongRandom, among_random
from tiltmeter.stats.jackknife import Interval, jackknife_intervals, without_each
from tiltmeter.steering.controls import draw_seeds, norm_matched, random_vectors
from tiltmeter.steering.sweep_logits import sweep_cost
from tiltmeter.steering.vector import RANDOM, V_STAR


class Transfer:
    """Options of the transfer.

    Args:
        sites: whose vectors, and where they are added: several, or ``all``.
        position: where states are read that v* is made of (:mod:`tiltmeter.states.positions`); one reading a response at most.
        n_random: random vectors at each site, at the norm of its own v*; null: 99 at both final sites, 20 elsewhere.
        n_prompts: test pairs, at most; null: all of the second half.
        seed: of the split into halves and of the random vectors.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        sites: str | Sequence[str] = "all",
        position: Position = "prompt_last",
        n_random: int | None = None,
        n_prompts: int | None = 32,
        seed: int = 0,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        least = {"n_random": (n_random, 1), "n_prompts": (n_prompts, 1), "seed": (seed, 0)}
        check_options("transfer", least, {"dtype": (dtype, DTYPES), "position": (position, ONE_PER_SIDE)})
        self.sites, self.position, self.n_random, self.n_prompts = sites, position, n_random, n_prompts
        self.seed, self.dtype, self.device = seed, dtype, device

    def table(self, checkpoints: Checkpoints) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Estimate the vectors and add each at each site; a row for each source and site, and the settings.

        Raises:
            UserError: an unknown site, one site alone, too few prompts, or models that don't differ at a site.
        """
        sites = self._sites(checkpoints)
        estimation, test = split_by_prompt(checkpoints.pairs, seed=self.seed)
        states = States(checkpoints, estimation, sites, position=self.position)
        vectors = {site: v_star(states, site) for site in sites}
        sweep = TeacherForcedSweep(
            checkpoints.base,
            checkpoints.aligned,
            test[: self.n_prompts],
            direction="interpolation",
            strengths=[0.0, 1.0],
        )
        table = pd.DataFrame([row for site in sites for row in self._rows(sweep, vectors, site)])
        settings = {
            "n_estimation": len(estimation),
            "n_test": len(sweep.groups),
            "n_random": {site: n_drawn(site, self.n_random) for site in sites},
            "position": self.position,
            "aligned_change": sweep.goal_change(),
        }
        return table, settings

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """Passes of the test pairs and their tokens."""
        sites, n_layers = self._sites(checkpoints), checkpoints.base.model.config.num_hidden_layers
        test = split_by_prompt(checkpoints.pairs, seed=self.seed).test[: self.n_prompts]
        passes = 1 + sum(
            sweep_cost(
                n_layers, min(site_depth(site, n_layers), n_layers - 1), len(sites) + n_drawn(site, self.n_random)
            )
            for site in sites
        )
        n_tokens = sum(pair.n_row_tokens for pair in test)
        return [Cost("teacher-forced", passes, round(passes * n_tokens))]

    def _sites(self, checkpoints: Checkpoints) -> tuple[str, ...]:
        sites = resolve_sites(self.sites, checkpoints.base.model.config.num_hidden_layers)
        if len(sites) < 2:
            raise UserError(f"transfer.sites: expected at least two sites or all, got {', '.join(sites)}")
        return sites

    def _rows(
        self, sweep: TeacherForcedSweep, vectors: dict[str, Tensor], site: str
    ) -> Iterator[dict[str, float | str]]:
        """A row for every vector added at one site; the last ones compare."""
        own = vectors[site]
        moved = {source: norm_matched(v[None], own, how=V_STAR).vectors[0] for source, v in vectors.items()}
        seeds = draw_seeds(n_drawn(site, self.n_random), kind=RANDOM, site=site, seed=self.seed)
        added = torch.cat([torch.stack(list(moved.values())), random_vectors(own, seeds).vectors]).float()
        sums = sweep.measure(site, torch.cat([torch.zeros_like(added[:1]), added]), [0.0] + [1.0] * len(added))
        known = [(source, V_STAR, 0, float(cosine(v, own))) for source, v in moved.items()]
        known += [(f"{RANDOM}_{i}", RANDOM, i, math.nan) for i in range(1, len(seeds) + 1)]
        known += [(name, name, 0, math.nan) for name in (OWN_LESS_OTHERS, OWN_LESS_RANDOM)]
        figures = compared(sums, sweep.groups, n_sites=len(moved), own=list(moved).index(site))
        for (name, kind, draw, along), (recovery, change) in zip(known, figures, strict=True):
            row = {"source": name, "site": site, **_named("recovery", recovery), **_named("margin_change", change)}
            yield row | {"cosine": along, "norm": float(own.norm()), "n": len(sweep.groups), "kind": kind, "draw": draw}


Figures = tuple[Interval | AmongRandom, Interval | AmongRandom]


def compared(sums: Sums, groups: Sequence[str], *, n_sites: int, own: int) -> Iterator[Figures]:
    """R and change of margin of every vector; then those of ``own`` less the mean of the other sites', and among random ones.

    Intervals are 95 % over prompts; other sites' vectors are these and no sample, random ones are a sample
    (:func:`tiltmeter.stats.among_random.among_random`). R is NaN where base and aligned model predict the same up to rounding.

    Args:
        sums: no shift first, then the vectors of all sites, then random ones.
        n_sites: how many vectors of sites there are.
        own: which of them is the site's own.
    """
    of_rows, margins = sums.recovery.row_sums(), sums.margins[1:] - sums.margins[0]
    differ = float(of_rows.kl_start.sum()) > torch.finfo(torch.float32).eps * float(of_rows.n_tokens.sum())
    others = [i for i in range(n_sites) if i != own]

    def recovery(kept: Tensor) -> Tensor:
        start = kept @ of_rows.kl_start if differ else torch.full_like(kept[:, 0], math.nan)
        return 1 - kept @ of_rows.kl_steered[1:].T / start[:, None]

    def change(kept: Tensor) -> Tensor:
        return kept @ margins.T / kept.sum(1, keepdim=True)

    def and_own_less_others(figures: Callable[[Tensor], Tensor], kept: Tensor) -> Tensor:
        x = figures(kept)
        return torch.cat([x, x[:, [own]] - x[:, others].mean(1, keepdim=True)], dim=1)

    found = [jackknife_intervals(partial(and_own_less_others, x), groups) for x in (recovery, change)]
    yield from zip(*found, strict=True)
    r, m = (figures(without_each(groups)) for figures in (recovery, change))
    yield among_random(r[:, own], r[:, n_sites:]), among_random(m[:, own], m[:, n_sites:])


def _named(name: str, figure: Interval | AmongRandom) -> dict[str, float | str]:
    interval = figure.difference if isinstance(figure, AmongRandom) else figure
    found: dict[str, float | str] = {**interval.named(name)}
    if isinstance(figure, AmongRandom):
        found |= {f"{name}_p_above": figure.p_above, f"{name}_p_below": figure.p_below}
        return found | {f"{name}_verdict": figure.verdict}
    return found
