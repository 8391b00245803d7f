"""What noise alone would give: sign flips, the Marchenko–Pastur edge, the BBP transition, parallel analysis (control C14)."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor

from tiltmeter.consistency import SplitHalf, at_least_two_rows, split_half_of_gram
from tiltmeter.geometry import unit_rows
from tiltmeter.spectra import singular_values

_FLIPS_AT_A_TIME = 256


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


def in_sample_cosine_null(n_rows: int) -> float:
    """Mean of cos(δ_i, v*) when the δ_i are noise: about 1/√N, since each row is part of its own mean.

    >>> in_sample_cosine_null(100)
    0.1
    """
    return 1 / math.sqrt(n_rows)


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


def split_half_null(updates: Float[Tensor, "row d_model"], *, n_flips: int = 500, seed: int = 0) -> SplitHalf:
    """:func:`tiltmeter.consistency.split_half` of rows whose signs were flipped at random, a new split for each flip.

    Raises:
        ValueError: fewer than two rows.
    """
    updates = at_least_two_rows(updates, name="split_half_null")
    n, generator = len(updates), torch.Generator().manual_seed(seed)
    signs = _random_signs(n_flips, n, generator)
    halves = (torch.rand(n_flips, n, generator=generator).argsort(1) < n // 2).to(torch.float64)
    return split_half_of_gram(updates @ updates.T, halves.to(updates.device), signs.to(updates.device))


def marchenko_pastur_edge(n_rows: int, d_model: int, *, noise_variance: float = 1.0) -> float:
    """s²(1 + √(d/N))²: largest eigenvalue of XᵀX/N for N rows of d independent entries of variance s².

    >>> round(marchenko_pastur_edge(2000, 1000), 4)
    2.9142
    """
    return float(noise_variance * (1 + math.sqrt(d_model / n_rows)) ** 2)


def marchenko_pastur_median(n_rows: int, d_model: int) -> float:
    """Median of the min(N, d) nonzero eigenvalues of XᵀX/N, at noise variance 1."""
    gamma = min(d_model / n_rows, n_rows / d_model)
    low, high = (1 - math.sqrt(gamma)) ** 2, (1 + math.sqrt(gamma)) ** 2

    def below(x: float) -> float:
        """Share of eigenvalues under x; x = mid − half · cos t takes the density's root singularities out."""
        mid, half = (low + high) / 2, (high - low) / 2
        end = math.acos(max(-1.0, min(1.0, (mid - x) / half)))
        return float(quad(lambda t: (half * math.sin(t)) ** 2 / (mid - half * math.cos(t)), 0, end)[0]) / (
            2 * math.pi * gamma
        )

    median = brentq(lambda x: below(x) - 0.5, low, high)
    return float(median * max(1.0, d_model / n_rows))


def noise_variance(sigma: Float[Tensor, " k"], *, n_rows: int, d_model: int) -> float:
    """Variance of an entry if the median squared singular value is noise (Gavish & Donoho 2014), so few spikes don't count.

    Args:
        sigma: all min(N, d) singular values of the centred rows.
    """
    positive = sigma[sigma > 0].to(torch.float64)
    if not len(positive):
        return math.nan
    return float(positive.square().median()) / n_rows / marchenko_pastur_median(n_rows, d_model)


def signal_rank(sigma: Float[Tensor, " k"], *, n_rows: int, d_model: int, variance: float | None = None) -> int:
    """How many singular values of centred rows lie above the Marchenko–Pastur edge.

    Args:
        variance: of the noise; None: estimated, :func:`noise_variance`.
    """
    s2 = noise_variance(sigma, n_rows=n_rows, d_model=d_model) if variance is None else variance
    edge = marchenko_pastur_edge(n_rows, d_model, noise_variance=s2)
    return int((sigma.to(torch.float64).square() / n_rows > edge).sum())


def bbp_eigenvalue(theta: float, gamma: float) -> float:
    """Where a spike of variance 1 + θ over unit noise shows in the sample: (1+θ)(1 + γ/θ), γ = d/N, if θ > √γ.

    Below that (Baik, Ben Arous & Péché 2005) it stays at the noise's edge (1+√γ)².

    >>> bbp_eigenvalue(2.0, 0.5)
    3.75
    """
    return (1 + theta) * (1 + gamma / theta) if theta > math.sqrt(gamma) else (1 + math.sqrt(gamma)) ** 2


def bbp_overlap(theta: float, gamma: float) -> float:
    """cos² between a spike and the sample's first direction: (1 − γ/θ²) / (1 + γ/θ) if θ > √γ, else 0.

    >>> round(bbp_overlap(2.0, 0.5), 6)
    0.7
    """
    return (1 - gamma / theta**2) / (1 + gamma / theta) if theta > math.sqrt(gamma) else 0.0


def parallel_analysis(
    rows: Float[Tensor, "row d_model"], *, n_permutations: int = 20, level: float = 0.95, seed: int = 0
) -> Float[Tensor, " k"]:
    """Singular values that centred rows would have if their dimensions were independent (Horn 1965).

    Each dimension is permuted on its own, which keeps its distribution; the ``level`` quantile over permutations is given
    for each of the k = min(N, d) values. An observed σ_j above the j-th is more than the dimensions' own spread.
    """
    centred = rows.to(torch.float64) - rows.to(torch.float64).mean(0)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n_permutations):
        order = torch.rand(centred.shape, generator=generator).argsort(0).to(centred.device)
        found.append(singular_values(centred.gather(0, order)))
    return torch.stack(found).quantile(level, dim=0)


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
