"""Null distributions: sign flips, edges of noise spectra, signal ranks, BBP transition, parallel analysis (C14)."""

import math
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tiltmeter.geometry.consistency import at_least_two_rows, random_halves, split_half_of_gram
from tiltmeter.geometry.rows import unit_rows
from tiltmeter.geometry.spectra import singular_values

_FLIPS_AT_A_TIME = 256
_NUMBERS_AT_A_TIME = 2_000_000
_TRACY_WIDOM_95 = 0.9793
_LOWEST = 0.9
"""Share of the eigenvalues that noise is estimated from."""
_GAP_SPAN = 3
_GAP_95 = (1.393, 1.527, 1.600, 1.649, 1.688, 1.718, 1.742, 1.763, 1.783, 1.800)
"""95 % quantiles of the largest of the first 1, 2 … 10 gaps of white noise: 20,000 draws of 31 rows of 64, which exceed
those of larger matrices by up to 8 % (tests/calibration/test_signal_rank.py draws them again)."""
_WEISZFELD_STEPS = 20


class SignFlipNull(NamedTuple):
    """Figures of rows whose signs were flipped at random: what they would be if no row knew of the others."""

    shift_share: Float[Tensor, " flip"]
    """f of each flip; its mean is 1/N."""
    mean_cosine_in_sample: Float[Tensor, " flip"]
    mean_cosine_leave_one_out: Float[Tensor, " flip"]
    p_value: float
    """(1 + number of flips with f at least the observed one) / (1 + flips): uniform when the rows are symmetric noise."""

    def band(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Central interval of each figure under the null, by the name of its field."""
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        names = ("shift_share", "mean_cosine_in_sample", "mean_cosine_leave_one_out")
        bounds = {name: getattr(self, name).cpu().quantile(tails).tolist() for name in names}
        return {name: (low, high) for name, (low, high) in bounds.items()}


def sign_flip_null(updates: Float[Tensor, "row d_model"], *, n_flips: int = 1000, seed: int = 0) -> SignFlipNull:
    """Shift share and mean cosines after flipping each row's sign at random: s_i δ_i, s_i = ±1.

    Flipping keeps every norm and the whole Gram matrix up to signs, so heavy tails and outlier dimensions stay as they are.
    E f = 1/N exactly.

    Raises:
        ValueError: fewer than two rows.
    """
    updates = at_least_two_rows(updates, name="sign_flip_null")
    n, generator = len(updates), torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, n_flips, _FLIPS_AT_A_TIME):
        signs = _random_signs(min(_FLIPS_AT_A_TIME, n_flips - start), n, generator)
        parts.append(_flipped(updates, signs.to(updates.device)))
    shares, in_sample, left_out = torch.cat(parts).unbind(1)
    observed = n * updates.mean(0).square().sum() / updates.square().sum()
    reached = shares >= observed * (1 - 1e-12)  # rounding must not tell a flip from the same rows
    return SignFlipNull(shares, in_sample, left_out, (1 + int(reached.sum())) / (1 + n_flips))


class SplitHalfNull(NamedTuple):
    """Split-half figures of rows whose signs were flipped at random, each the mean over the splits of one flip."""

    mean_cosine: Float[Tensor, " flip"]
    cosine_of_means: Float[Tensor, " flip"]


def split_half_null(
    updates: Float[Tensor, "row d_model"], *, n_flips: int = 500, n_splits: int = 20, seed: int = 0
) -> SplitHalfNull:
    """Null of the mean over ``n_splits`` splits that :func:`tiltmeter.geometry.consistency.split_half` of the same arguments has.

    Each flip is split like the rows themselves, by the same halves, so that the observed mean is one more draw of this null
    when the rows are symmetric noise. A single split a flip would make the null wider than what it stands beside.

    Raises:
        ValueError: fewer than two rows.
    """
    updates = at_least_two_rows(updates, name="split_half_null")
    n, generator = len(updates), torch.Generator().manual_seed(seed + 1)
    gram, halves = updates @ updates.T, random_halves(n, n_splits, seed=seed).to(updates.device)
    parts = []
    for signs in _random_signs(n_flips, n, generator).split(max(1, _NUMBERS_AT_A_TIME // (n * n_splits))):
        found = split_half_of_gram(gram, halves, signs.to(updates.device))
        parts.append(torch.stack([found.cosines.nanmean((-1, -2)), found.cosine_of_means.nanmean(-1)]))
    return SplitHalfNull(*torch.cat(parts, dim=1))


def tracy_widom_edge(n_rows: int, d_model: int, *, noise_variance: float = 1.0) -> float:
    """95 % quantile of the largest eigenvalue of XᵀX/N for N rows of d independent entries of variance s².

    (μ + .9793 σ)·s²/N with μ = (√n + √p)², σ = (√n + √p)(1/√n + 1/√p)^⅓ (Johnstone 2001), n = N − ½ and p = d − ½ (Ma 2012);
    .9793 is that quantile of the Tracy–Widom law for β = 1 (Bejan 2005, table 1).

    >>> round(tracy_widom_edge(2000, 1000), 4)
    2.9273
    """
    n, p = math.sqrt(n_rows - 0.5), math.sqrt(d_model - 0.5)
    return noise_variance * ((n + p) ** 2 + _TRACY_WIDOM_95 * (n + p) * (1 / n + 1 / p) ** (1 / 3)) / n_rows


def noise_variance(sigma: Float[Tensor, " k"], *, n_rows: int, d_model: int, n_spikes: int = 0) -> float:
    """Variance of an entry of noise: mean of the lowest 90 % of the squared singular values, over what it is at variance 1.

    The largest tenth is left out, so that few spikes don't count.

    Args:
        sigma: all singular values, largest first.
        n_rows: independent rows: one fewer than there are if their mean was taken out.
        n_spikes: leading values that are known to be signal, each of which takes a row and a dimension with it.
    """
    noise = sigma[n_spikes : min(n_rows, d_model)].to(torch.float64).square()
    if not len(noise):
        return math.nan
    lowest = noise[-max(1, round(_LOWEST * len(noise))) :]
    n, d = n_rows - n_spikes, d_model - n_spikes
    return float(lowest.mean()) / n / _marchenko_pastur_mean(n, d, len(lowest) / len(noise))


@cache
def _marchenko_pastur_mean(n_rows: int, d_model: int, lowest: float) -> float:
    """Mean of the lowest share of the min(N, d) nonzero eigenvalues of XᵀX/N, at noise variance 1."""
    gamma = min(d_model / n_rows, n_rows / d_model)
    t = math.pi * (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    x = 1 + gamma - 2 * math.sqrt(gamma) * t.cos()  # takes the root singularities of the density out
    weights = t.sin().square() / x
    below = weights.cumsum(0) <= lowest * weights.sum() * (1 + 1e-12)
    return float((x * weights)[below].sum() / weights[below].sum()) * max(1.0, d_model / n_rows)


def signal_rank_white(sigma: Float[Tensor, " k"], *, n_rows: int, d_model: int) -> int:
    """Number of leading singular values above white noise, at a level of 5 %: equal, independent dimensions.

    One after the other, until one is not above the 95 % quantile of the largest that the rest would have as noise (Kritchman &
    Nadler 2008; the quantile: :func:`tracy_widom_edge`). At most half of the values count, so that noise is left to compare with.

    Args:
        sigma: all singular values, largest first.
        n_rows: independent rows: one fewer than there are if their mean was taken out.
    """
    rank, sigma = 0, sigma.to(torch.float64)
    while rank < min(n_rows, d_model) // 2:
        n, d = n_rows - rank, d_model - rank
        variance = noise_variance(sigma, n_rows=n_rows, d_model=d_model, n_spikes=rank)
        if not float(sigma[rank].square()) > n * tracy_widom_edge(n, d, noise_variance=variance):
            break
        rank += 1
    return rank


def signal_rank_correlated(rows: Float[Tensor, "row d_model"]) -> int:
    """Number of directions of centred rows that stand apart from noise whose dimensions may be correlated, at a level of 5 %.

    Under such noise a large singular value alone says nothing, but its spectrum ends in a smooth edge, where gaps are alike
    whatever the covariance (Onatski 2009, whose statistic with m = 1 this is with m = 3): k directions are more than noise if
    for some i of k … 10 the gap (ℓ_i − ℓ_{i+1}) / (ℓ_{i+1} − ℓ_{i+1+m}) of the eigenvalues is above its 95 % quantile
    under noise. Heavy tails are taken out first: each dimension over its mean deviation, each row to length one about the
    geometric median (spatial signs), which no rank survives or gains by.

    At most 10, and a quarter of min(N − 1, d). What it can't see: directions in a spectrum that falls off evenly, like a power law;
    and a direction that is one dimension alone, which is taken for unequal spread. Error rates: docs/statistics.md.
    """
    n_values = min(len(rows) - 1, rows.shape[1])
    n_tested = max(0, min(len(_GAP_95), n_values // 4, n_values - 1 - _GAP_SPAN))
    eigenvalues = singular_values(_spatial_signs(rows.to(torch.float64))).square()
    at = torch.arange(n_tested)
    below = eigenvalues[at + 1] if n_tested else eigenvalues[:0]
    gaps = (eigenvalues[at] - below) / (below - eigenvalues[at + 1 + _GAP_SPAN])
    return next((k for k in range(n_tested) if not (gaps[k:] > _GAP_95[n_tested - k - 1]).any()), n_tested)


def _spatial_signs(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """Unit rows about their geometric median (Weiszfeld's iteration), dimensions first set to equal mean deviation."""
    rows = rows - rows.median(0).values
    deviations = rows.abs().mean(0)
    rows = rows / deviations.where(deviations > 0, 1.0)
    centre = torch.zeros_like(rows[0])
    for _ in range(_WEISZFELD_STEPS):
        distances = (rows - centre).norm(dim=1, keepdim=True)
        weights = 1 / distances.where(distances > 0, torch.inf)
        centre = (rows * weights).sum(0) / weights.sum().where(weights.any(), 1.0)
    signs = unit_rows(rows - centre)
    return signs - signs.mean(0)


def parallel_analysis(
    rows: Float[Tensor, "row d_model"], *, n_permutations: int = 19, seed: int = 0
) -> Float[Tensor, " k"]:
    """Singular values that centred rows would have if their dimensions were independent (Horn 1965).

    Each dimension is permuted on its own, which keeps its distribution; the largest over the permutations is given for each
    of the k = min(N, d) values. An observed σ₁ above it is more than the dimensions' own spread at a level of
    1 / (``n_permutations`` + 1) exactly: 5 % for 19.
    """
    centred = rows.to(torch.float64) - rows.to(torch.float64).mean(0)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n_permutations):
        order = torch.rand(centred.shape, generator=generator).argsort(0).to(centred.device)
        found.append(singular_values(centred.gather(0, order)))
    return torch.stack(found).amax(0)


def _random_signs(n_flips: int, n_rows: int, generator: torch.Generator) -> Float[Tensor, "flip row"]:
    return 2.0 * torch.randint(0, 2, (n_flips, n_rows), generator=generator, dtype=torch.float64) - 1


def _flipped(updates: Tensor, signs: Tensor) -> Tensor:
    """[flip, (f, mean cosine in-sample, mean cosine leave-one-out)]."""
    n = len(updates)
    means = signs @ updates / n  # [flip, d]
    square = means.square().sum(1, keepdim=True)
    along = signs * (means @ updates.T)  # ⟨s_i δ_i, v⟩
    norms = updates.norm(dim=1)
    in_sample = signs * (means @ unit_rows(updates).T) / square.sqrt()
    others = n * n * square - 2 * n * along + norms.square()  # ‖n v − s_i δ_i‖²
    left_out = (n * along - norms.square()) / (norms * others.clamp(min=0).sqrt())
    share = n * square[:, 0] / norms.square().sum()
    return torch.stack([share, in_sample.mean(1), left_out.nan_to_num(0, 0, 0).mean(1)], dim=1)
