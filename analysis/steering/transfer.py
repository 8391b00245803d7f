"""Does v* of one layer do anything at another? Every site's vector is added at every site, beside random vectors.

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
from analysis.open.checkpoints import Checkpoints
from analysis.steering.directions import States, split_by_prompt, v_star
from analysis.steering.transfer_pairs import Sums, TestPairs
from analysis.steering.transfer_section import OWN_LESS_OTHERS, OWN_LESS_RANDOM, RANDOM
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


class Transfer:
    """What to ask.

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
        for name, (value, lowest) in least.items():
            if value is not None and value < lowest:
                raise UserError(f"transfer.{name}: expected at least {lowest}, got {value}")
        if dtype not in DTYPES:
            raise UserError(f"transfer.dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
        if position not in ONE_PER_SIDE:
            raise UserError(f"transfer.position: expected one of {', '.join(ONE_PER_SIDE)}, got {position}")
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
        pairs = TestPairs(checkpoints, test[: self.n_prompts])
        table = pd.DataFrame([row for site in sites for row in self._rows(pairs, vectors, site)])
        n_random = {site: n_drawn(site, self.n_random) for site in sites}
        settings = {"n_estimation": len(estimation), "n_test": len(pairs.groups), "n_random": n_random}
        return table, settings | {"position": self.position, "aligned_change": pairs.aligned_change()}

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

    def _rows(self, pairs: TestPairs, vectors: dict[str, Tensor], site: str) -> Iterator[dict[str, object]]:
        """A row for every vector added at one site; the last ones compare."""
        own = vectors[site]
        moved = {source: norm_matched(v[None], own, provenance="v*").vectors[0] for source, v in vectors.items()}
        seeds = draw_seeds(n_drawn(site, self.n_random), kind="random", site=site, seed=self.seed)
        drawn = random_vectors(own, seeds).vectors
        sums = pairs.measure(site, torch.cat([torch.stack(list(moved.values())), drawn]).float())
        names = [*moved, *(f"{RANDOM}{i + 1}" for i in range(len(drawn)))]
        for name, recovery, change in compared(sums, pairs.groups, names, own=site):
            known = {
                "cosine": float(cosine(moved[name], own)) if name in moved else math.nan,
                "norm": float(own.norm()),
            }
            figures = _named("recovery", recovery) | _named("margin_change", change)
            yield {"source": name, "site": site, **figures, **known, "n": len(pairs.groups)}


def compared(
    sums: Sums, groups: Sequence[str], names: Sequence[str], *, own: str
) -> Iterator[tuple[str, Interval | AmongRandom, Interval | AmongRandom]]:
    """R and change of margin of every vector; then those of ``own`` less the mean of the other sites', and among random ones.

    Intervals are 95 % over prompts; other sites' vectors are these and no sample, random ones are a sample
    (:func:`tiltmeter.stats.among_random.among_random`). R is NaN where base and aligned model predict the same up to rounding.
    """
    differ = float(sums.kl_start.sum()) > torch.finfo(torch.float32).eps * float(sums.n_tokens.sum())
    at, others = names.index(own), [i for i, x in enumerate(names) if x != own and not x.startswith(RANDOM)]
    random = [i for i, x in enumerate(names) if x.startswith(RANDOM)]

    def recovery(kept: Tensor) -> Tensor:
        start = kept @ sums.kl_start if differ else torch.full_like(kept[:, 0], math.nan)
        return 1 - kept @ sums.kl.T / start[:, None]

    def change(kept: Tensor) -> Tensor:
        return kept @ sums.margin_change.T / kept.sum(1, keepdim=True)

    def and_own_less_others(figures: Callable[[Tensor], Tensor], kept: Tensor) -> Tensor:
        x = figures(kept)
        return torch.cat([x, x[:, [at]] - x[:, others].mean(1, keepdim=True)], dim=1)

    found = [jackknife_intervals(partial(and_own_less_others, x), groups) for x in (recovery, change)]
    yield from zip([*names, OWN_LESS_OTHERS], *found, strict=True)
    r, m = (figures(without_each(groups)) for figures in (recovery, change))
    yield OWN_LESS_RANDOM, among_random(r[:, at], r[:, random]), among_random(m[:, at], m[:, random])


def _named(name: str, figure: Interval | AmongRandom) -> dict[str, float | str]:
    interval = figure.difference if isinstance(figure, AmongRandom) else figure
    found: dict[str, float | str] = {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    if isinstance(figure, AmongRandom):
        found |= {f"{name}_p_above": figure.p_above, f"{name}_p_below": figure.p_below}
        return found | {f"{name}_verdict": figure.verdict}
    return found
