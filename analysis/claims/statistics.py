"""Statistics of claims: one number T of the hidden states of one run, over the sites of the claim, and T without each prompt.

A statistic is told of states under a condition, such as another position or without outlier dimensions (CLAIMS.md §3, §4).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from tiltmeter.geometry.consistency import cosine, leave_one_out_means, shift_shares_of_gram
from tiltmeter.geometry.energy_distance import kernels_after_shift
from tiltmeter.geometry.rows import in_own_span, outlier_dims, unit_rows
from tiltmeter.geometry.spectra import entropies_of_gram, leading_energies_of_gram
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM
from tiltmeter.states.capture import ReadPoint
from tiltmeter.states.positions import Position
from tiltmeter.states.state_pair import StatePair
from tiltmeter.stats.arms import Arm
from tiltmeter.stats.jackknife import jackknife_variance, without_each

LEAST_APART = 4.0
"""Standard errors that two clouds must be apart before a share of their distance means anything."""
LEAST_TYPES = 4
"""Token types below which their own shifts can't be told from a common one."""


@dataclass(frozen=True)
class Read:
    """Hidden states of one run or draw, as far as they were read.

    Args:
        states: of the held-out prompts.
        seed: of the run, or number of the draw.
        content_ids: id of each pair's content token by pair id; empty: not known.
        unrelated: of unrelated text; None where it was not read.
        preference: at the tokens where responses part; None where they were not read.
        other_corpus: the same of another corpus' pairs (C13).
    """

    states: StatePair
    seed: int = 0
    content_ids: Mapping[str, int] = field(default_factory=dict)
    unrelated: StatePair | None = None
    preference: "Parting | None" = None
    other_corpus: "Parting | None" = None


class Parting(NamedTuple):
    """States that predict the first tokens in which a pair's responses differ."""

    states: StatePair
    """Base and policy at ``diverge``."""
    v: Float[Tensor, "row d_model"]
    """v = e_w − e_l of each row."""


@dataclass(frozen=True)
class Rows:
    """Rows of one site under a condition, with the prompt of each."""

    base: Float[Tensor, "row d_model"]
    update: Float[Tensor, "row d_model"]
    clusters: Sequence[str]


class Missing(Exception):
    """States that a statistic needs were not read; says which."""


def upper_sites(sites: Sequence[str]) -> list[str]:
    """The last third of the blocks, and before the final norm: the sites of the paper's claims (CLAIMS.md §3).

    Args:
        sites: in the order of the forward pass.

    >>> upper_sites(["layer_00", "layer_01", "layer_02", "final_pre_norm", "final_post_norm"])
    ['layer_02', 'final_pre_norm']
    """
    blocks = _blocks(sites)
    return [*blocks[len(blocks) - math.ceil(len(blocks) / 3) :], *(s for s in sites if s == FINAL_PRE_NORM)]


def lower_sites(sites: Sequence[str]) -> list[str]:
    """The first third of the blocks; arguments as of :func:`upper_sites`.

    >>> lower_sites(["layer_00", "layer_01", "layer_02", "final_pre_norm"])
    ['layer_00']
    """
    blocks = _blocks(sites)
    return blocks[: math.ceil(len(blocks) / 3)]


def _blocks(sites: Sequence[str]) -> list[str]:
    return [site for site in sites if site not in (FINAL_PRE_NORM, FINAL_POST_NORM)]


SITES: Mapping[str, Callable[[Sequence[str]], list[str]]] = {
    "upper": upper_sites,
    "lower": lower_sites,
    FINAL_PRE_NORM: lambda sites: [FINAL_PRE_NORM],
    FINAL_POST_NORM: lambda sites: [FINAL_POST_NORM],
}
"""Names of sets of sites → those of a model."""


def raw(read: Read, point: ReadPoint) -> Rows:
    """The rows as they are. Raises Missing: that position was not read."""
    return _rows(read.states, point)


def content(read: Read, point: ReadPoint) -> Rows:
    """Rows at a content token of each prompt, which templates don't share."""
    return _rows(read.states, ReadPoint(point.site, "content"))


def unrelated(read: Read, point: ReadPoint) -> Rows:
    """Rows at the last tokens of unrelated text."""
    if read.unrelated is None:
        raise Missing("states of unrelated text were not read")
    return _rows(read.unrelated, ReadPoint(point.site, "prompt_last"))


def base_states(read: Read, point: ReadPoint) -> Rows:
    """The base's own states in the place of the update: what alike tokens give without any training."""
    rows = raw(read, point)
    return Rows(rows.base, rows.base, rows.clusters)


def outliers_removed(read: Read, point: ReadPoint) -> Rows:
    """Rows without the base's outlier dimensions, chosen on a third of the rows and judged on the others (C10)."""
    rows = raw(read, point)
    without, told = outlier_dims(rows.base)
    kept = torch.ones(rows.base.shape[1], dtype=torch.bool)
    kept[without] = False
    return Rows(rows.base[told][:, kept], rows.update[told][:, kept], rows.clusters[told])


def centred(read: Read, point: ReadPoint) -> Rows:
    """Rows less the mean update, so that a constant shift is taken out."""
    rows = raw(read, point)
    return Rows(rows.base, rows.update - rows.update.mean(0), rows.clusters)


def unit(read: Read, point: ReadPoint) -> Rows:
    """Rows at length one, so that few long ones don't decide."""
    rows = raw(read, point)
    return Rows(unit_rows(rows.base), unit_rows(rows.update), rows.clusters)


def token_types(read: Read, point: ReadPoint) -> Rows:
    """One row a token type, the mean over the content tokens of that id (C11).

    A shift that each type has of its own does not make rows of different types alike; one that all have does.
    """
    rows, pairs = content(read, point), read.states.ids_of(ReadPoint(point.site, "content"))
    if not read.content_ids:
        raise Missing("ids of the content tokens are not known")
    ids = [read.content_ids[pair] for pair in pairs]
    names = sorted(set(ids))
    if len(names) < LEAST_TYPES:
        raise Missing(f"content tokens are of {len(names)} types, expected at least {LEAST_TYPES}")
    member = torch.tensor([[float(i == name) for i in ids] for name in names], dtype=torch.float64)
    means = member / member.sum(1, keepdim=True)
    return Rows(means @ rows.base, means @ rows.update, [str(name) for name in names])


CONDITIONS: Mapping[str, Callable[[Read, ReadPoint], Rows]] = {
    "raw": raw,
    "content": content,
    "unrelated": unrelated,
    "base_states": base_states,
    "outliers_removed": outliers_removed,
    "centred": centred,
    "unit_rows": unit,
    "token_types": token_types,
}
"""Condition → the rows that a statistic is told of under it."""

Values = Float[Tensor, " resample"]


def mean_cosine(rows: Rows) -> Values:
    """Mean leave-one-out cosine of an update with the mean update of the other prompts (Fig. 3)."""
    gram = _gram(rows.update)
    return leave_one_out_means(gram, without_each(rows.clusters))


def top1_energy(rows: Rows) -> Values:
    """ρ₁, share of the updates' energy along their first direction (Fig. 4b)."""
    return leading_energies_of_gram(_gram(rows.update))(without_each(rows.clusters))[:, 0]


def sigma_ratio(rows: Rows) -> Values:
    """σ₂/σ₁ of the updates (Fig. 4b)."""
    return leading_energies_of_gram(_gram(rows.update))(without_each(rows.clusters))[:, 1].sqrt()


def shift_share(rows: Rows) -> Values:
    """f, share of the updates' energy that is one constant row."""
    return shift_shares_of_gram(_gram(rows.update))(without_each(rows.clusters))


def entropy_change(rows: Rows) -> Values:
    """Spectral entropy of the policy's states less that of the base's, centred, by energy, nats (Fig. 4a)."""
    found = []
    for states in (rows.base + rows.update, rows.base):
        gram = _gram(states - states.mean(0))
        found.append(entropies_of_gram(gram)(without_each(rows.clusters))[:, 0])
    return found[0] - found[1]


def explained_by_shift(rows: Rows) -> Values:
    """Share of the energy distance between base and policy that v* of other prompts takes away (Fig. 1c).

    0 where the clouds are no further apart than chance: less than :data:`LEAST_APART` standard errors.
    """
    base, update = in_own_span(torch.cat([rows.base, rows.update])).chunk(2)
    apart, moved, _ = kernels_after_shift(base, update, rows.clusters)
    weights = without_each(rows.clusters)
    left, whole = ((weights @ kernel * weights).sum(1) for kernel in (moved, apart))
    size = whole / weights.sum(1).square()
    if len(size) > 2 and size[0] < LEAST_APART * jackknife_variance(size[1:]).sqrt():
        return torch.zeros_like(whole)
    return 1 - left / whole


STATISTICS: Mapping[str, Callable[[Rows], Values]] = {
    "mean_cosine": mean_cosine,
    "top1_energy": top1_energy,
    "sigma_ratio": sigma_ratio,
    "shift_share": shift_share,
    "entropy_change": entropy_change,
    "explained_by_shift": explained_by_shift,
}
"""Name → figure of the rows of one site; T is its mean over the sites of a claim."""


def preference_cosine(read: Read, site: str, condition: str = "raw") -> Values:
    """Mean cosine of the update with v = e_w − e_l where responses part (Fig. 1a).

    Args:
        condition: ``permuted``: v of another pair, the next one's; ``other_corpus``: pairs of another corpus.

    Raises:
        Missing: they were not read.
    """
    parting = read.other_corpus if condition == "other_corpus" else read.preference
    if parting is None:
        raise Missing(_NO_PARTING[condition == "other_corpus"])
    found = [point for point in parting.states.points if point.site == site]
    if not found:
        raise Missing(f"states at {site} where responses part were not read")
    v = parting.v.roll(1, 0) if condition == "permuted" else parting.v
    cosines = cosine(parting.states.update(found[0]), v).nan_to_num(0.0)
    weights = without_each(parting.states.clusters_of(found[0]))
    return weights @ cosines / weights.sum(1)


_NO_PARTING = (
    "states where responses part were not read",
    "no other corpus was read; add data=… with another source",
)
PREFERENCE_STATISTICS = ("preference_cosine",)
"""Statistics of the tokens where responses part."""
PREFERENCE_CONDITIONS = ("permuted", "other_corpus")
"""Conditions of those statistics."""


class Source(Protocol):
    """Arms whose figures can be asked for."""

    def of_states(self, name: str, statistic: "Statistic") -> Arm | str:
        """T of hidden states."""

    def of_table(self, name: str, asked: Any) -> Arm | str:
        """T of a report's table."""

    def of_losses(self, name: str) -> Arm | str:
        """T of held-out losses."""


@dataclass(frozen=True)
class Statistic:
    """A statistic of a claim: what is computed, where, and of what.

    Args:
        name: of :data:`STATISTICS` or :data:`PREFERENCE_STATISTICS`.
        sites: of :data:`SITES`.
        minus: sites whose mean is taken off; None: nothing is.
        position: of the states.
        condition: of :data:`CONDITIONS` or :data:`PREFERENCE_CONDITIONS`.
    """

    name: str
    sites: str = "upper"
    minus: str | None = None
    position: Position = "prompt_last"
    condition: str = "raw"

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions that it can be told of."""
        return PREFERENCE_CONDITIONS if self.name in PREFERENCE_STATISTICS else tuple(CONDITIONS)

    def under(self, condition: str) -> "Statistic":
        """The same statistic under another condition."""
        return replace(self, condition=condition)

    def of_arm(self, name: str, arms: "Source") -> Arm | str:
        """T in the runs of an arm; text: why it is not known."""
        return arms.of_states(name, self)

    def of(self, read: Read) -> Values:
        """T on all prompts, then without each of them.

        Raises:
            Missing: states that it needs were not read.
        """
        values = self._mean_over(read, self.sites)
        return values if self.minus is None else values - self._mean_over(read, self.minus)

    def _mean_over(self, read: Read, named: str) -> Values:
        found = [self._at(read, site) for site in SITES[named](_sites_of(read.states))]
        if not found:
            raise Missing(f"no state was read at the sites {named}")
        return torch.stack(found).mean(0)

    def _at(self, read: Read, site: str) -> Values:
        if self.name in PREFERENCE_STATISTICS:
            return preference_cosine(read, site, self.condition)
        return STATISTICS[self.name](CONDITIONS[self.condition](read, ReadPoint(site, self.position)))


def _sites_of(states: StatePair) -> list[str]:
    return list(dict.fromkeys(point.site for point in states.points))


def _rows(states: StatePair, point: ReadPoint) -> Rows:
    if point not in states.policy or not len(states.policy[point].rows):
        raise Missing(f"states at {point.site}, {point.position} were not read")
    return Rows(states.base[point].rows.double(), states.update(point), states.clusters_of(point))


def _gram(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row row"]:
    own = in_own_span(rows)
    return own @ own.T
