"""Does v* of one layer do anything at another? Every site's vector is added at every site, beside random vectors.

v* is estimated on one half of the held-out prompts, all numbers are of the other half, teacher-forced.
"""

import math
from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor

from analysis.checkpoints import Checkpoints
from analysis.costs import Cost
from analysis.report import Section
from analysis.steering_directions import States, split_by_prompt, v_star
from analysis.transfer_pairs import Sums, TestPairs
from analysis.transfer_section import OWN_LESS_OTHERS, OWN_LESS_RANDOM, RANDOM, transfer_section
from tiltmeter.consistency import cosine
from tiltmeter.controls import norm_matched, random_vectors
from tiltmeter.errors import UserError
from tiltmeter.layers import resolve_sites, site_depth
from tiltmeter.models import DTYPES
from tiltmeter.positions import Position
from tiltmeter.probe import ONE_PER_SIDE
from tiltmeter.stats.bootstrap import Interval, cluster_intervals
from tiltmeter.sweeping import sweep_cost


class Transfer:
    """What to ask.

    Args:
        sites: whose vectors, and where they are added: several, or ``all``.
        position: where states are read that v* is made of (:mod:`tiltmeter.positions`); one reading a response at most.
        n_random: random vectors at each site, at the norm of its own v*.
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
        n_random: int = 5,
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

    def section(self, checkpoints: Checkpoints) -> Section:
        """Estimate the vectors, add each at each site, and draw what came of it.

        Raises:
            UserError: an unknown site, one site alone, too few prompts, or models that don't differ at a site.
        """
        sites = self._sites(checkpoints)
        estimation, test = split_by_prompt(checkpoints.pairs, seed=self.seed)
        states = States(checkpoints, estimation, sites, position=self.position)
        vectors = {site: v_star(states, site) for site in sites}
        pairs = TestPairs(checkpoints, test[: self.n_prompts])
        table = pd.DataFrame([row for site in sites for row in self._rows(pairs, vectors, site)])
        settings = {"n_estimation": len(estimation), "n_test": len(pairs.groups), "n_random": self.n_random}
        return transfer_section(table, settings | {"position": self.position, "aligned_change": pairs.aligned_change()})

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """Passes of the test pairs and their tokens."""
        sites, n_layers = self._sites(checkpoints), checkpoints.base.model.config.num_hidden_layers
        test = split_by_prompt(checkpoints.pairs, seed=self.seed).test[: self.n_prompts]
        n_vectors = len(sites) + self.n_random
        passes = 1 + sum(sweep_cost(n_layers, min(site_depth(s, n_layers), n_layers - 1), n_vectors) for s in sites)
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
        controls = random_vectors(own, self.n_random, seed=self.seed).vectors
        moved |= {f"{RANDOM}{i + 1}": v for i, v in enumerate(controls)}
        sums = pairs.measure(site, torch.stack(list(moved.values())).float())
        names = list(moved)
        others = [i for i, name in enumerate(names) if name in vectors and name != site]
        random = [i for i, name in enumerate(names) if name not in vectors]
        recovery, change = compared(sums, pairs.groups, own=names.index(site), against=[others, random])
        for i, name in enumerate([*names, OWN_LESS_OTHERS, OWN_LESS_RANDOM]):
            known = {
                "cosine": float(cosine(moved[name], own)) if name in moved else math.nan,
                "norm": float(own.norm()),
            }
            figures = _named("recovery", recovery[i]) | _named("margin_change", change[i])
            yield {"source": name, "site": site, **figures, **known, "n": len(pairs.groups)}


def compared(
    sums: Sums, groups: Sequence[str], *, own: int, against: Sequence[Sequence[int]]
) -> tuple[list[Interval], list[Interval]]:
    """R and change of margin of every vector; then those of ``own`` less the mean of each set of others, paired by prompt.

    Intervals are 95 % over prompts. R is NaN where base and aligned model predict the same up to rounding.
    """
    n_vectors = len(sums.kl)
    differ = float(sums.kl_start.sum()) > torch.finfo(torch.float32).eps * float(sums.n_tokens.sum())

    def figures(drawn: Tensor) -> Tensor:
        start = drawn @ sums.kl_start if differ else torch.full_like(drawn[:, 0], math.nan)
        recovery = 1 - drawn @ sums.kl.T / start[:, None]
        change = drawn @ sums.margin_change.T / drawn.sum(1, keepdim=True)
        columns = [
            torch.cat([x, *(x[:, own, None] - x[:, rows].mean(1, keepdim=True) for rows in map(list, against))], dim=1)
            for x in (recovery, change)
        ]
        return torch.cat(columns, dim=1)

    found = cluster_intervals(figures, groups)
    return found[: n_vectors + len(against)], found[n_vectors + len(against) :]


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
