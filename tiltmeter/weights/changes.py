"""Change of one weight matrix between two models: entries that changed, ranks, spectral drift, angles, and its cut to a rank.

"Rank" of an update is said in three ways that must not be mixed up: the numerical rank counts singular values above rounding, the
stable rank ‖ΔW‖²/σ₁² how evenly they are spread, and an energy how much the first few hold. Matrices are [out, in].
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor

from tiltmeter.geometry.similarity import subspace_angles

RANKS = (1, 2, 4, 16)
"""Ranks that updates are cut to."""
EXACT_UP_TO = 1024
"""Smaller side of a matrix up to which all its singular values are computed; of larger ones the leading ones."""
_EPS = torch.finfo(torch.float32).eps


class SVD(NamedTuple):
    """Leading singular values and vectors, largest first, float32 or wider."""

    left: Float[Tensor, "out k"]
    sigma: Float[Tensor, " k"]
    right: Float[Tensor, "in k"]

    def truncated(self, rank: int) -> Float[Tensor, "out in"]:
        """The best matrix of that rank (Eckart & Young 1936), as far as its vectors are here."""
        return (self.left[:, :rank] * self.sigma[:rank]) @ self.right[:, :rank].T


class WeightChange(NamedTuple):
    """Figures of W → W' of one matrix; NaN where nothing changed, but for the first three."""

    changed_share: float
    """Share of entries whose bfloat16 values differ."""
    relative_norm: float
    """‖ΔW‖ / ‖W‖."""
    spectral_drift: float
    """NSS = ‖σ(W') − σ(W)‖ / ‖σ(W)‖, of all singular values or of the leading ones."""
    numerical_rank: float
    """Singular values of ΔW above max(m, n) · ε₃₂ · σ₁; NaN for a large matrix that has more than were computed."""
    stable_rank: float
    """‖ΔW‖² / σ₁²."""
    energies: tuple[float, ...]
    """Shares of ‖ΔW‖² that ΔW cut to each of :data:`RANKS` holds; the first one is ρ₁."""
    angle_left: float
    angle_right: float
    """Largest principal angle, radians, of the leading left and right singular subspaces of W and W'."""
    n_values: int
    """Singular values that were computed."""


class MaskOverlap(NamedTuple):
    """Agreement of two masks of changed entries."""

    overlap: float
    """Entries that both changed, over those that the one with fewer did; NaN where one changed none."""
    chance: float
    """The same, expected of masks of these sizes that have nothing to do with each other."""


def changed_mask(base: Tensor, policy: Tensor, dtype: torch.dtype = torch.bfloat16) -> Bool[Tensor, "..."]:
    """True for entries whose values differ once they are rounded to a dtype (arXiv 2505.11711 looks at bfloat16).

    Raises:
        ValueError: different shapes.
    """
    if base.shape != policy.shape:
        raise ValueError(f"changed_mask: expected one shape, got {tuple(base.shape)} and {tuple(policy.shape)}")
    return base.to(dtype) != policy.to(dtype)


def mask_overlap(one: Bool[Tensor, "..."], other: Bool[Tensor, "..."]) -> MaskOverlap:
    """Overlap of two masks of one shape, such as of two seeds, beside chance.

    >>> mask_overlap(torch.tensor([True, True, False, False]), torch.tensor([True, False, False, False]))
    MaskOverlap(overlap=1.0, chance=0.5)
    """
    if one.shape != other.shape:
        raise ValueError(f"mask_overlap: expected one shape, got {tuple(one.shape)} and {tuple(other.shape)}")
    fewer, more = sorted((int(one.sum()), int(other.sum())))
    overlap = int((one & other).sum()) / fewer if fewer else math.nan
    return MaskOverlap(overlap, more / one.numel() if one.numel() else math.nan)


def leading_svd(matrix: Float[Tensor, "out in"], k: int) -> SVD:
    """The k leading singular values and vectors: exactly in float64, of large matrices by Lanczos' method in float32.

    A randomised SVD would misplace directions where singular values fall off slowly, as those of weights do; restarted Lanczos
    iterations go on until each is known to 1e-6.
    """
    k = min(k, *matrix.shape)
    if min(matrix.shape) <= EXACT_UP_TO:
        left, sigma, right = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
        return SVD(left[:, :k], sigma[:k], right[:k].T)
    narrow = matrix.to(torch.float32)
    if not narrow.any():
        return SVD(torch.zeros(len(narrow), k), torch.zeros(k), torch.zeros(narrow.shape[1], k))
    times = LinearOperator(
        tuple(narrow.shape),
        matvec=lambda x: (narrow @ _column(x)).numpy(),
        rmatvec=lambda x: (narrow.T @ _column(x)).numpy(),
        dtype=np.float32,
    )
    start = np.random.default_rng(0).standard_normal(min(narrow.shape)).astype(np.float32)
    left, sigma, right = (torch.from_numpy(np.ascontiguousarray(x)) for x in svds(times, k=k, v0=start, tol=1e-6))
    order = sigma.argsort(descending=True)
    return SVD(left[:, order], sigma[order], right[order].T)


def weight_change(
    base: Float[Tensor, "out in"], policy: Float[Tensor, "out in"], *, k: int = 16, update: SVD | None = None
) -> WeightChange:
    """Every figure of one matrix.

    Args:
        k: leading singular values and vectors: of the angles, and of all else for a large matrix.
        update: leading SVD of W' − W with at least 16 values, where it is known.

    Raises:
        ValueError: different shapes.
    """
    share = float(changed_mask(base, policy).float().mean())
    wide = torch.float64 if min(base.shape) <= EXACT_UP_TO else torch.float32
    before, after = base.to(wide), policy.to(wide)
    delta = after - before
    norm, size = float(delta.norm()), float(before.norm())
    if norm == 0:
        return WeightChange(share, 0.0, 0.0, math.nan, math.nan, (math.nan,) * len(RANKS), 0.0, 0.0, 0)
    own, changed = leading_svd(before, k), leading_svd(after, k)
    if wide == torch.float64:
        sigmas = [torch.linalg.svdvals(x) for x in (before, after, delta)]
    else:
        sigmas = [own.sigma, changed.sigma, (update or leading_svd(delta, max(k, RANKS[-1]))).sigma]
    found = sigmas[2].double()
    rank = float((found > max(base.shape) * _EPS * found[0]).sum())
    is_whole = len(found) == min(base.shape) or rank < len(found)
    return WeightChange(
        share,
        norm / size if size else math.inf,
        float((sigmas[1] - sigmas[0]).norm() / sigmas[0].norm()),
        rank if is_whole else math.nan,
        norm**2 / float(found[0]) ** 2,
        tuple(min(1.0, float(found[:r].square().sum()) / norm**2) for r in RANKS),
        float(subspace_angles(own.left, changed.left).max()),
        float(subspace_angles(own.right, changed.right).max()),
        len(sigmas[0]),
    )


def _column(x: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def mean_share(shares: Sequence[tuple[float, int]]) -> float:
    """Share of all entries, of the shares of matrices and their numbers of entries; NaN without any.

    >>> mean_share([(1.0, 1), (0.0, 3)])
    0.25
    """
    total = sum(n for _, n in shares)
    return sum(share * n for share, n in shares) / total if total else math.nan
