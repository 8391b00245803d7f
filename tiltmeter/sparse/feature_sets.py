"""Sets of sparse features: which ones are used, what each is of, and random sets that are a fair match of them."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from torch import Tensor

_N_ORDERS, _NEAR = 25, 0.05
"""Orders that a set matched in usage is looked for in, and how near is near enough."""


class FeatureMeans:
    """Streams how often, and how much, each of some numbers by feature differs from 0 over tokens.

    Args:
        width: number of features.
    """

    def __init__(self, width: int) -> None:
        self.n_rows = 0
        self._sums = torch.zeros(width, dtype=torch.float64)
        self._n_active = torch.zeros(width, dtype=torch.long)

    @torch.no_grad()
    def update(self, values: Float[Tensor, "row width"]) -> None:
        """Add further tokens."""
        self.n_rows += len(values)
        self._sums += values.abs().double().sum(0).cpu()
        self._n_active += (values != 0).sum(0).cpu()

    @property
    def size(self) -> Float[Tensor, " width"]:
        """Mean |value| over all tokens, float64."""
        return self._sums / max(1, self.n_rows)

    @property
    def frequency(self) -> Float[Tensor, " width"]:
        """Share of tokens at which it is not 0, float64."""
        return self._n_active.double() / max(1, self.n_rows)


class AttributeOfFeature(NamedTuple):
    """Attribute that each feature goes with, if one does."""

    attribute: Int[Tensor, " width"]
    """Its number; −1: none."""
    correlation: Float[Tensor, " width"]
    """Pearson's r with it on texts that it was not chosen on; NaN where there is none."""
    disagreement: float
    """Share of the features with an attribute on the first texts whose class is another on the others; NaN without any."""


def correlations(
    features: Float[Tensor, "text width"], levels: Float[Tensor, "text attribute"]
) -> Float[Tensor, "attribute width"]:
    """Pearson's r of each feature's mean activation with each attribute over texts, float64; 0 where one of them never varies."""
    centred = [x.double() - x.double().mean(0) for x in (levels, features)]
    first, second = (torch.nn.functional.normalize(x, dim=0) for x in centred)
    return first.t() @ second


def attribute_of_features(
    chosen_on: Float[Tensor, "attribute width"],
    held_out: Float[Tensor, "attribute width"],
    classes: Sequence[str],
    *,
    least: float = 0.3,
) -> AttributeOfFeature:
    """Attribute whose r is largest on one half of the texts, kept where the other half confirms it.

    Args:
        chosen_on: r on the texts that the attribute is chosen on (:func:`correlations`).
        held_out: r on texts of other prompts.
        classes: class of each attribute; features are compared by it where the two halves disagree.
        least: |r| in either half, with one sign, below which a feature has no attribute.
    """
    best, other = chosen_on.abs().argmax(0), held_out.abs().argmax(0)
    ours = chosen_on.gather(0, best[None])[0]
    theirs = held_out.gather(0, best[None])[0]
    has_one = ours.abs() >= least
    confirmed = has_one & (theirs.abs() >= least) & (ours.sign() == theirs.sign())
    names = [[classes[i] for i in of.tolist()] for of in (best, other)]
    differs = torch.tensor([a != b for a, b in zip(*names, strict=True)])
    disagreement = float(differs[has_one].double().mean()) if bool(has_one.any()) else float("nan")
    nothing = torch.full_like(theirs, float("nan"))
    return AttributeOfFeature(best.where(confirmed, torch.tensor(-1)), theirs.where(confirmed, nothing), disagreement)


def random_sets(usage: Float[Tensor, " width"], n: int, *, n_draws: int, seed: int) -> Bool[Tensor, "draw width"]:
    """Random sets of n features, out of all that are used; fewer where there aren't as many."""
    found = torch.zeros(n_draws, len(usage), dtype=torch.bool)
    for row, order in zip(found, _orders(usage, n_draws, seed), strict=True):
        row[order[:n]] = True
    return found


def matched_in_usage(
    usage: Float[Tensor, " width"], target: float, *, n_draws: int, seed: int
) -> Bool[Tensor, "draw width"]:
    """Random sets of features that are used as much in total as a set that they are held against, however many that takes.

    They are drawn out of all used features, also those of that set: if its members were chosen blindly it is one more such draw.
    Sets of *other* features alone are no null: they share what is left, so that a blind choice lies outside them three times as
    often as it should (tests/calibration). Features are taken up in random order as long as the sum stays within the target; of
    up to 25 orders the first that comes within 5 % counts, else the nearest.

    >>> usage = torch.tensor([4.0, 2.0, 2.0, 1.0, 9.0])
    >>> matched_in_usage(usage, 4.0, n_draws=1, seed=0).double() @ usage.double() <= 4
    tensor([True])
    """
    used_by = usage.tolist()
    found = torch.zeros(n_draws, len(usage), dtype=torch.bool)
    orders = _orders(usage, n_draws * _N_ORDERS, seed)
    for row in found:
        nearest, least = list[int](), target
        for order in islice(orders, _N_ORDERS):
            if least <= _NEAR * target:
                continue
            taken, left = list[int](), target
            for feature in order.tolist():
                if used_by[feature] <= left:
                    taken.append(feature)
                    left -= used_by[feature]
            if left < least:
                nearest, least = taken, left
        row[nearest] = True
    return found


def _orders(usage: Tensor, n_draws: int, seed: int) -> Iterator[Tensor]:
    """Used features in random order, once a draw."""
    used = torch.nonzero(usage > 0)[:, 0]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_draws):
        yield used[torch.randperm(len(used), generator=generator)]


def most_used(usage: Float[Tensor, " width"], share: float) -> Bool[Tensor, " width"]:
    """The features used most, a share of those that are used at all, at least one of them unless the share is 0.

    >>> most_used(torch.tensor([3.0, 0.0, 1.0, 2.0]), 0.34).tolist()
    [True, False, False, True]
    """
    n_used = int((usage > 0).sum())
    n = min(n_used, int(-(-share * n_used // 1)))
    kept = torch.zeros(len(usage), dtype=torch.bool)
    kept[usage.argsort(descending=True, stable=True)[:n]] = True
    return kept


def relabelled(
    labels: Int[Tensor, " width"], error: float, *, n_classes: int, n_draws: int, seed: int
) -> Int[Tensor, "draw width"]:
    """Labels in which each is, with the probability of an error, another one of the classes, all others equally likely."""
    generator = torch.Generator().manual_seed(seed)
    shape = n_draws, len(labels)
    shift = torch.randint(1, max(2, n_classes), shape, generator=generator)
    is_wrong = torch.rand(shape, generator=generator) < error
    return torch.where(is_wrong, (labels + shift) % n_classes, labels.expand(shape))


class RankOverlap(NamedTuple):
    """Agreement of two rankings of the same features, beside chance."""

    value: float
    """Spearman's ρ."""
    null_mean: float
    """Mean of ρ when features that are as often active are exchanged."""
    null_high: float
    """95th percentile of it."""
    p_value: float
    """(1 + #{ρ_null ≥ ρ}) / (1 + permutations)."""
    n_features: int


def rank_overlap(
    ours: Float[Tensor, " width"],
    theirs: Float[Tensor, " width"],
    density: Float[Tensor, " width"],
    *,
    stratum: int = 4,
    n_permutations: int = 999,
    seed: int = 0,
) -> RankOverlap:
    """Spearman's ρ of how much two methods use each feature, held against features that are as often active.

    What is active more often is moved more by anything, so that two methods agree without meaning the same. Features are permuted
    among their neighbours in density; the p-value is exact where, given the density, their order says nothing, and nearly so where
    density varies within a stratum (tests/tiltmeter/sparse).

    Args:
        ours, theirs: usage, any unit.
        density: share of tokens at which each feature is active; those that never are, and that neither uses, are left out.
        stratum: features of neighbouring density that are exchanged with each other.
    """
    kept = torch.nonzero((density > 0) | (ours > 0) | (theirs > 0))[:, 0]
    if len(kept) < 3:
        return RankOverlap(float("nan"), float("nan"), float("nan"), float("nan"), len(kept))
    first, second = (torch.from_numpy(rankdata(x[kept].double().numpy())) for x in (ours, theirs))
    first, second = (torch.nn.functional.normalize(x - x.mean(), dim=0) for x in (first, second))
    strata = density[kept].argsort(stable=True).split(stratum)
    generator = torch.Generator().manual_seed(seed)
    null = torch.empty(n_permutations, dtype=torch.float64)
    for draw in range(n_permutations):
        mixed = second.clone()
        for places in strata:
            mixed[places] = second[places[torch.randperm(len(places), generator=generator)]]
        null[draw] = first @ mixed
    value = float(first @ second)
    p_value = (1 + int((null >= value - 1e-12).sum())) / (1 + n_permutations)
    return RankOverlap(value, float(null.mean()), float(null.quantile(0.95)), p_value, len(kept))
