"""Likeness of two models' representations of the same prompts, by Gram matrices or rows of N prompts, never d × d.

Every measure but the overlap of neighbours is told of centred rows, so that one vector added to all rows changes nothing:
likeness of this kind cannot see a constant shift. Rows of one prompt are no independent draws: take one row a prompt
(:func:`one_row_a_prompt`). Intervals are over prompts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from tiltmeter.geometry.rows import in_own_span
from tiltmeter.stats.jackknife import (
    COSINE,
    NO_INTERVAL,
    SHARE,
    Interval,
    interval_without_each,
    jackknife_interval,
)

LEAST_PROMPTS = 6
"""Prompts from which likeness has an interval: the debiased HSIC without one of them needs four others."""
_ROUNDING = 1e-24


class Matched(NamedTuple):
    """Likeness of two clouds by a measure, its interval, and its value for clouds that have nothing to do with each other."""

    interval: Interval
    chance: float


class Mantel(NamedTuple):
    """RSA with its interval and the p-value of Mantel's test."""

    interval: Interval
    p_value: float
    null_high: float
    """97.5 % quantile over permutations."""


def one_row_a_prompt(rows: Float[Tensor, "row d_model"], clusters: Sequence[str]) -> Float[Tensor, "prompt d_model"]:
    """Mean of each prompt's rows in float64, prompts in the order of their first row.

    >>> one_row_a_prompt(torch.tensor([[1.0], [3.0], [5.0]]), ["a", "b", "a"]).tolist()
    [[3.0], [3.0]]
    """
    order = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    if len(order) == len(clusters):
        return rows.to(torch.float64)
    index = torch.tensor([order[name] for name in clusters])
    sums = torch.zeros(len(order), rows.shape[1], dtype=torch.float64).index_add_(0, index, rows.to(torch.float64))
    return sums / torch.bincount(index)[:, None]


def without_shift(
    base: Float[Tensor, "prompt d_model"], policy: Float[Tensor, "prompt d_other"]
) -> Float[Tensor, "prompt d_model"]:
    """h_π,i − v*₋ᵢ in float64: each row less the mean update v* of the other rows.

    Raises:
        ValueError: fewer than two rows, or models of different widths, which have no difference.
    """
    if base.shape != policy.shape or len(base) < 2:
        raise ValueError(
            f"without_shift: expected at least two rows of one width, got {tuple(base.shape)} and {tuple(policy.shape)}; v* is a "
            "difference of the two models' rows"
        )
    base, policy = base.to(torch.float64), policy.to(torch.float64)
    update = policy - base
    return policy - (update.sum(0) - update) / (len(base) - 1)


def gram(rows: Float[Tensor, "prompt d_model"], *, centred: bool = True) -> Float[Tensor, "prompt prompt"]:
    """X Xᵀ in float64; centred: of the rows less their mean. Zeros where rows are equal up to rounding."""
    exact = rows.to(torch.float64)
    if not centred:
        return exact @ exact.T
    less = exact - exact.mean(0)
    if less.square().sum() <= _ROUNDING * exact.square().sum():
        less = torch.zeros_like(less)
    return less @ less.T


def u_centred(gram_matrix: Float[Tensor, "prompt prompt"]) -> Float[Tensor, "prompt prompt"]:
    """U-centred Gram matrix (Székely & Rizzo 2014): Σ_ij of two such products is n(n − 3) HSIC_u.

    Raises:
        ValueError: fewer than four rows.
    """
    n = len(gram_matrix)
    if n < 4:
        raise ValueError(f"u_centred: expected at least 4 rows, got {n}")
    zeroed = gram_matrix.to(torch.float64).clone().fill_diagonal_(0.0)
    sums = zeroed.sum(1)
    centred = zeroed - (sums[:, None] + sums) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0.0)


def hsic_unbiased(one: Float[Tensor, "prompt prompt"], other: Float[Tensor, "prompt prompt"]) -> float:
    """Unbiased HSIC of two Gram matrices (Song et al. 2012, eq. 5), 0 in the mean for independent rows.

    [tr(K̃L̃) + 1ᵀK̃1·1ᵀL̃1/((n−1)(n−2)) − 2/(n−2)·1ᵀK̃L̃1] / (n(n−3)), K̃: K with a zero diagonal.

    Raises:
        ValueError: fewer than four rows, or matrices of different sizes.
    """
    _check_sizes(one, other)
    return float(_hsics(*(m.to(torch.float64).clone().fill_diagonal_(0.0) for m in (one, other)))[0])


def linear_cka(x: Float[Tensor, "prompt d_one"], y: Float[Tensor, "prompt d_other"], *, debiased: bool = True) -> float:
    """Linear CKA of two representations of the same prompts (Kornblith et al. 2019), of any widths; 1: equal up to rotation.

    Args:
        debiased: by the unbiased HSIC, which is 0 in the mean for independent rows; the biased one goes to 1 for d ≫ n.

    Returns:
        NaN where one has no variance.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 2.0], [3.0, 1.0], [0.0, -2.0]])
    >>> round(linear_cka(x, -2 * x.flip(1)), 9)
    1.0
    """
    return cka_of_grams(gram(x), gram(y), debiased=debiased)


def cka_of_grams(
    one: Float[Tensor, "prompt prompt"],
    other: Float[Tensor, "prompt prompt"],
    *,
    debiased: bool = True,
) -> float:
    """Linear CKA of two Gram matrices: HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)); the biased one of centred rows' matrices."""
    if debiased:
        return float(_ckas(one, other)[0]) if _vary(one, other) else math.nan
    return float((one * other).sum() / (one.norm() * other.norm())) if _vary(one, other) else math.nan


def cka_interval(
    one: Float[Tensor, "prompt prompt"],
    other: Float[Tensor, "prompt prompt"],
    *,
    level: float = 0.95,
) -> Interval:
    """Debiased CKA of two Gram matrices with a jackknife interval over prompts, on Fisher's z.

    Without each prompt in turn in closed form: O(n²) for all of them.

    Returns:
        NaN with fewer than six prompts, or where one representation has no variance.
    """
    _check_sizes(one, other)
    if len(one) < LEAST_PROMPTS or not _vary(one, other):
        return NO_INTERVAL
    values = _ckas(one, other)
    return interval_without_each(values[0], values[1:], level=level, scale=COSINE)


def cka_map(
    ones: Sequence[Float[Tensor, "prompt prompt"]], others: Sequence[Float[Tensor, "prompt prompt"]]
) -> Float[Tensor, "one other"]:
    """Debiased CKA of every one with every other, of U-centred Gram matrices, which may be kept in float32."""
    a, b = (torch.stack([m.flatten() for m in ms]) for ms in (ones, others))
    found = torch.zeros(len(ones), len(others), dtype=torch.float64)
    for part, other in zip(a.split(1 << 18, 1), b.split(1 << 18, 1), strict=True):
        found += part.double() @ other.double().T
    norms = [m.square().sum(1, dtype=torch.float64).sqrt() for m in (a, b)]
    return found / (norms[0][:, None] * norms[1])


def rsa(
    one: Float[Tensor, "prompt prompt"],
    other: Float[Tensor, "prompt prompt"],
    *,
    n_permutations: int = 99,
    seed: int = 0,
    level: float = 0.95,
) -> Mantel:
    """Representational similarity: Spearman's ρ of the prompts' pairwise distances under both models (Kriegeskorte 2008).

    p: (1 + permutations of the prompts that give as much) / (1 + permutations) (Mantel 1967). The interval is the jackknife's
    over prompts, with the others ranked anew.

    Args:
        one, other: Gram matrices, of any widths.

    Returns:
        NaN with fewer than six prompts, or where one representation has no variance.
    """
    _check_sizes(one, other)
    if len(one) < LEAST_PROMPTS or not _vary(one, other):
        return Mantel(NO_INTERVAL, math.nan, math.nan)
    a, b = _distance_ranks(one), _distance_ranks(other)
    interval = interval_without_each(*_spearmans(a, b), level=level, scale=COSINE)
    a, b = (_centred_off_diagonal(ranks) for ranks in (a, b))
    generator, scale, null = torch.Generator().manual_seed(seed), (a.norm() * b.norm()), []
    for _ in range(n_permutations):
        order = torch.randperm(len(one), generator=generator)
        null.append(float((a * b[order][:, order]).sum() / scale))
    more = sum(value >= interval.value - 1e-12 for value in null)
    high = float(np.quantile(null, 0.975)) if null else math.nan
    return Mantel(interval, (1 + more) / (1 + n_permutations), high)


def mutual_knn(
    x: Float[Tensor, "prompt d_one"], y: Float[Tensor, "prompt d_other"], *, k: int = 10, level: float = 0.95
) -> Matched:
    """Share of each prompt's k nearest neighbours that it has under both models, mean over prompts (Huh et al. 2024).

    Neighbours by cosine, of rows that are not centred: the one measure here in which a constant shift shows. Independent clouds
    share k/(n − 1). The interval is the jackknife's over prompts; without one, the next nearest takes its place.

    Returns:
        NaN with fewer than k + 2 prompts, or where the rows of one model are equal.
    """
    if len(x) != len(y):
        raise ValueError(f"mutual_knn: expected rows of the same prompts, got {len(x)} and {len(y)}")
    if len(x) < k + 2 or not all(len(rows) and (rows != rows[0]).any() for rows in (x, y)):
        return Matched(NO_INTERVAL, math.nan)
    return neighbour_overlap(nearest(x, k), nearest(y, k), level=level)


def nearest(
    rows: Float[Tensor, "prompt d_model"], k: int, of_rows: Float[Tensor, "prompt prompt"] | None = None
) -> Int[Tensor, "prompt k_and_one"]:
    """Numbers of the k + 1 rows with the largest cosine but for the row itself, the nearest first.

    Args:
        of_rows: their centred Gram matrix (:func:`gram`), where it is there already.
    """
    exact = rows.to(torch.float64)
    mean = exact.mean(0)
    along = (exact - mean) @ mean
    products = (gram(exact) if of_rows is None else of_rows) + along[:, None] + along + mean @ mean
    sizes = products.diagonal().clamp(min=0).sqrt()
    cosines = products / (sizes[:, None] * sizes).clamp(min=torch.finfo(torch.float64).tiny)
    return cosines.fill_diagonal_(-math.inf).topk(k + 1, dim=1).indices


def neighbour_overlap(
    x: Int[Tensor, "prompt k_and_one"], y: Int[Tensor, "prompt k_and_one"], *, level: float = 0.95
) -> Matched:
    """:func:`mutual_knn` of two lists of :func:`nearest` rows."""
    shared = _shared_neighbours(x, y)
    found = interval_without_each(shared[0], shared[1:], level=level)
    return Matched(found._replace(low=max(found.low, 0.0), high=min(found.high, 1.0)), (x.shape[1] - 1) / (len(x) - 1))


def procrustes(
    x: Float[Tensor, "prompt d_model"], y: Float[Tensor, "prompt d_other"], *, level: float = 0.95
) -> Interval:
    """Share of one cloud's energy that no rotation and scale of the other explains: 1 − (Σσ_i(XᵀY))² / (‖X‖²‖Y‖²), centred.

    0: a rotation. Fewer prompts than dimensions are easier to rotate onto each other, whatever they are: compare at one n only.
    The interval is the jackknife's over prompts, the rotation held fixed, which changes it to second order only.

    Returns:
        NaN with fewer than six prompts, or where one representation has no variance.

    Raises:
        ValueError: different widths.
    """
    if x.shape != y.shape:
        raise ValueError(f"procrustes: expected rows of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    if len(x) < LEAST_PROMPTS:
        return NO_INTERVAL
    one, other = (in_own_span(rows.double() - rows.double().mean(0)) for rows in (x, y))
    sizes = [rows.square().sum(1) for rows in (one, other)]
    if any(
        float(size.sum()) <= _ROUNDING * float(rows.double().square().sum())
        for size, rows in zip(sizes, (x, y), strict=True)
    ):
        return NO_INTERVAL
    u, _, v = torch.linalg.svd(one.T @ other, full_matrices=False)
    matched = ((one @ u) * (other @ v.T)).sum(1)
    names = [f"{i:06d}" for i in range(len(x))]

    def residual(w: Tensor) -> Tensor:
        return (1 - (w @ matched).square() / ((w @ sizes[0]) * (w @ sizes[1]))).clamp(min=0)

    return jackknife_interval(residual, names, level=level, scale=SHARE)


def displacement(
    base: Float[Tensor, "prompt d_model"], policy: Float[Tensor, "prompt d_other"], *, level: float = 0.95
) -> Interval:
    """Σ‖h_π − h₀‖² / Σ‖h₀ − h̄₀‖²: energy of the change over the base's variance, nothing rotated or scaled; over prompts.

    Returns:
        NaN with fewer than six prompts, or where the base has no variance.

    Raises:
        ValueError: different widths.
    """
    if base.shape != policy.shape:
        raise ValueError(f"displacement: expected rows of one shape, got {tuple(base.shape)} and {tuple(policy.shape)}")
    base, policy = base.double(), policy.double()
    spread, moved = (base - base.mean(0)).square().sum(1), (policy - base).square().sum(1)
    if len(base) < LEAST_PROMPTS or float(spread.sum()) <= _ROUNDING * float(base.square().sum()):
        return NO_INTERVAL
    names = [f"{i:06d}" for i in range(len(base))]
    return jackknife_interval(lambda w: (w @ moved) / (w @ spread), names, level=level)


def principal_angles(
    x: Float[Tensor, "prompt d_model"], y: Float[Tensor, "prompt d_other"], *, k: int = 4
) -> Float[Tensor, " k"]:
    """Angles between the spans of the first k principal components of both clouds, radians, smallest first (Björck & Golub 1973).

    Raises:
        ValueError: different widths, or k not below the number of prompts and at most the width.
    """
    if x.shape != y.shape or not 1 <= k <= min(len(x) - 1, x.shape[1]):
        raise ValueError(
            f"principal_angles: expected rows of one shape and k below their number, got {tuple(x.shape)}, {tuple(y.shape)}, k={k}"
        )
    return subspace_angles(*(_leading(rows.double() - rows.double().mean(0), k) for rows in (x, y)))


def subspace_angles(a: Float[Tensor, "d_model k"], b: Float[Tensor, "d_model k"]) -> Float[Tensor, " k"]:
    """Principal angles between two spans of orthonormal columns, radians, smallest first; small ones by their sines.

    >>> turned = torch.tensor([[math.cos(1e-9)], [math.sin(1e-9)]], dtype=torch.float64)
    >>> bool((subspace_angles(torch.eye(2, 1, dtype=torch.float64), turned) - 1e-9).abs() < 1e-15)
    True
    """
    inner = a.T @ b
    cosines = torch.linalg.svdvals(inner).clamp(max=1.0)
    sines = torch.linalg.svdvals(b - a @ inner).clamp(max=1.0).flip(0)
    return torch.where(cosines.square() > 0.5, torch.asin(sines), torch.acos(cosines))


def _leading(centred: Tensor, k: int) -> Tensor:
    """First k right singular vectors as columns, by the smaller Gram matrix."""
    n, d = centred.shape
    if d <= n:
        return torch.linalg.eigh(centred.T @ centred)[1][:, -k:]
    left = torch.linalg.eigh(centred @ centred.T)[1][:, -k:]
    return torch.linalg.qr(centred.T @ left)[0]


def _hsics(one: Tensor, other: Tensor) -> Float[Tensor, " one_and_prompts"]:
    """HSIC_u of all rows and without each in turn; both matrices with a zero diagonal."""
    n, rows_k, rows_l, both = len(one), one.sum(1), other.sum(1), (one * other).sum(1)
    trace, sum_k, sum_l, chain = both.sum(), rows_k.sum(), rows_l.sum(), rows_k @ rows_l
    without = (
        trace - 2 * both,
        sum_k - 2 * rows_k,
        sum_l - 2 * rows_l,
        chain - rows_k * rows_l - one @ rows_l - other @ rows_k + both,
    )
    found = []
    for m, (t, a, b, c) in ((n, (trace[None], sum_k, sum_l, chain)), (n - 1, without)):
        found.append((t + a * b / ((m - 1) * (m - 2)) - 2 / (m - 2) * c) / (m * (m - 3)))
    return torch.cat(found)


def _ckas(one: Tensor, other: Tensor) -> Float[Tensor, " one_and_prompts"]:
    """Debiased CKA of all rows and without each in turn."""
    _check_sizes(one, other)
    one, other = (m.to(torch.float64).clone().fill_diagonal_(0.0) for m in (one, other))
    return _hsics(one, other) / (_hsics(one, one).clamp(min=0) * _hsics(other, other).clamp(min=0)).sqrt()


def _check_sizes(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape or len(one) < 4:
        raise ValueError(f"expected two Gram matrices of the same prompts, at least 4, got {len(one)} and {len(other)}")


def _vary(*grams: Tensor) -> bool:
    """Whether every matrix is that of finite rows that differ."""
    return all(bool(torch.isfinite(m).all()) and bool(m.any()) for m in grams)


def _distance_ranks(of: Tensor) -> Float[Tensor, "prompt prompt"]:
    """Ranks 1 … n(n − 1)/2 of the squared distances of pairs; 0 on the diagonal."""
    squares = of.diagonal()
    distances = squares[:, None] + squares - 2 * of
    rows, columns = torch.triu_indices(len(of), len(of), 1)
    found = torch.zeros_like(distances)
    found[rows, columns] = found[columns, rows] = torch.from_numpy(rankdata(distances[rows, columns].numpy()))
    return found


def _centred_off_diagonal(ranks: Tensor) -> Tensor:
    n = len(ranks)
    return (ranks - ranks.sum() / (n * (n - 1))).fill_diagonal_(0.0)


def _spearmans(a: Tensor, b: Tensor) -> tuple[Float[Tensor, ""], Float[Tensor, " prompt"]]:
    """Spearman's ρ of two matrices of ranks, and without each prompt, whose pairs' ranks the others close up (ties by order)."""
    n, centred = len(a), [_centred_off_diagonal(ranks) for ranks in (a, b)]
    whole = (centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm())
    pairs = np.triu_indices(n, 1)
    by_a, by_b = (np.argsort(ranks.numpy()[pairs], kind="stable") for ranks in (a, b))
    places = np.arange(len(by_a))
    in_b = np.empty_like(by_b)
    in_b[by_b] = places
    in_b, ends = in_b[by_a], np.concatenate([pairs[0][by_a], pairs[1][by_a]])  # all in the order of a
    gone_in_a = np.tile(places, 2)[np.lexsort((np.tile(places, 2), ends))].reshape(n, n - 1)
    m, without = (n - 1) * (n - 2) / 2, []
    for gone in gone_in_a:  # places of a prompt's pairs
        one = (places - _n_before(gone, len(places))).astype(np.float64)
        other = (in_b - _n_before(np.sort(in_b[gone]), len(places))[in_b]).astype(np.float64)
        one *= other
        products = one.sum() - one[gone].sum()  # BLAS's dot, in threads, takes longer
        without.append((products / m - ((m - 1) / 2) ** 2) * 12 / (m * m - 1))
    return whole, torch.tensor(without, dtype=torch.float64)


def _n_before(gone: NDArray[np.intp], n: int) -> NDArray[np.intp]:
    """Number of sorted places that are gone up to each of n places, itself included."""
    return np.repeat(np.arange(len(gone) + 1), np.diff(gone, prepend=0, append=n))


def _shared_neighbours(x: Tensor, y: Tensor) -> Float[Tensor, " one_and_prompts"]:
    """Mean share of the k nearest that two lists of the k + 1 nearest have in common: of all prompts, then without each."""
    n, k = len(x), x.shape[1] - 1
    near = [torch.zeros(n, n, dtype=torch.bool).scatter_(1, each[:, :k], True) for each in (x, y)]
    both, shared = near[0] & near[1], (near[0] & near[1]).sum(1).double()
    enters = [other.gather(1, each[:, k:]).double() for each, other in ((x, near[1]), (y, near[0]))]  # the next nearest
    same_next = (x[:, k:] == y[:, k:]).double()
    change = (near[0] * enters[0] + near[1] * enters[1] + both * (same_next - 1)).sum(
        0
    )  # by the prompt that is left out
    return torch.cat([shared.sum()[None] / (n * k), (shared.sum() - shared + change) / ((n - 1) * k)])
