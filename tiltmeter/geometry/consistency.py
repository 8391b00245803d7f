"""Do the updates of all prompts point the same way? Cosines of each update with the mean update, and their null bands.

δ_i = h_π(x_i) − h_0(x_i) are the rows. A row is part of its own mean, so the in-sample cosine of pure noise is about 1/√N;
leaving it out, or taking the mean from the other half, has null 0. A row or a mean of zeros has no direction: NaN.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tiltmeter.stats.jackknife import COSINE, Interval, jackknife_interval, jackknife_intervals


class SplitHalf(NamedTuple):
    """Agreement of two random halves, for each of several splits."""

    cosines: Float[Tensor, "*flip split row"]
    """cos(row, mean of the half that it is not in)."""
    cosine_of_means: Float[Tensor, "*flip split"]
    """cos between the two halves' means: how reproducible v* is."""

    @property
    def mean_cosine(self) -> Float[Tensor, "*flip split"]:
        """Mean of :attr:`cosines` over the rows of both halves."""
        return self.cosines.mean(-1)


def at_least_two_rows(updates: Float[Tensor, "row d_model"], *, name: str) -> Float[Tensor, "row d_model"]:
    """The rows in float64.

    Args:
        name: of the figure that needs them, for the message.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(updates) < 2:
        raise ValueError(f"{name}: expected at least two rows, got {len(updates)}")
    return updates.to(torch.float64)


def cosine(a: Float[Tensor, "*row d_model"], b: Float[Tensor, "*#row d_model"]) -> Float[Tensor, "*row"]:
    """⟨a, b⟩ / (‖a‖ ‖b‖) over the last axis, in float64; NaN where either is zero.

    >>> cosine(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0]])).tolist()
    [0.6, nan]
    """
    a, b = a.to(torch.float64), b.to(torch.float64)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def in_sample_cosines(updates: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
    """cos θ_i = ⟨δ_i, v*⟩ / (‖δ_i‖ ‖v*‖) with v* the mean of all rows, δ_i included (the paper's Fig. 3). Null: about 1/√N."""
    updates = updates.to(torch.float64)
    return cosine(updates, updates.mean(0, keepdim=True))


def leave_one_out_cosines(
    updates: Float[Tensor, "row d_model"], *, mean: Float[Tensor, " d_model"] | None = None, n_rows: int | None = None
) -> Float[Tensor, " row"]:
    """cos(δ_i, v*₋ᵢ), with v*₋ᵢ ∝ N v* − δ_i the mean of the other rows. Null: 0. NaN for a single row.

    Args:
        mean, n_rows: v* and N when ``updates`` is one chunk of all rows, as in a second streaming pass; give both or none.

    >>> leave_one_out_cosines(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).round(decimals=4).tolist()
    [0.7071, 0.7071, 0.0]
    """
    updates = updates.to(torch.float64)
    if (mean is None) != (n_rows is None):
        raise ValueError("leave_one_out_cosines: give mean and n_rows of all rows, or neither")
    if mean is None or n_rows is None:
        mean, n_rows = updates.mean(0), len(updates)
    if n_rows < 2:
        return torch.full_like(updates[:, 0], torch.nan)
    return cosine(updates, n_rows * mean.to(torch.float64) - updates)


def split_half(updates: Float[Tensor, "row d_model"], *, n_splits: int = 20, seed: int = 0) -> SplitHalf:
    """Cosines across random halves. Null: 0.

    Raises:
        ValueError: fewer than two rows.
    """
    updates = at_least_two_rows(updates, name="split_half")
    halves = random_halves(len(updates), n_splits, seed=seed).to(updates.device)
    return split_half_of_gram(updates @ updates.T, halves)


def random_halves(n_rows: int, n_splits: int, *, seed: int = 0) -> Float[Tensor, "split row"]:
    """1 for the ⌊N/2⌋ rows of the first half of each random split, 0 for the others, float64."""
    halves = torch.zeros(n_splits, n_rows, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for half in halves:
        half[torch.randperm(n_rows, generator=generator)[: n_rows // 2]] = 1.0
    return halves


def split_half_of_gram(
    gram: Float[Tensor, "row row"], halves: Float[Tensor, "split row"], signs: Float[Tensor, "*flip row"] | None = None
) -> SplitHalf:
    """Compute :func:`split_half` from inner products alone, so that many splits cost no pass over the rows.

    Args:
        gram: X Xᵀ of the rows, float64.
        halves: 1 for rows of the first half, 0 for the others.
        signs: ±1, what each row is multiplied by first; −1 at random gives the null. With signs [flip, row] every figure has
            the axis of flips in front, and each flip all splits.
    """
    signs = torch.ones_like(gram[0]) if signs is None else signs
    flipped = signs[..., None, :]
    norms = gram.diagonal().sqrt()
    first = (flipped * halves) @ gram  # ⟨x_i, Σ of a half⟩, of all splits at once
    sums = [first, flipped @ gram - first]
    energies = [(a * flipped * half).sum(-1) for a, half in zip(sums, (halves, 1 - halves), strict=True)]
    lengths = [energy.clamp(min=0).sqrt()[..., None] for energy in energies]
    other = torch.where(halves == 1, sums[1] / lengths[1], sums[0] / lengths[0])
    between = (sums[1] * flipped * halves).sum(-1) / (lengths[0] * lengths[1])[..., 0]
    return SplitHalf(flipped * other / norms, between)


def shift_shares_of_gram(
    gram: Float[Tensor, "row row"],
) -> Callable[[Float[Tensor, "resample row"]], Float[Tensor, " resample"]]:
    """f = N‖v*‖²/‖ΔH‖² of rows that count as much as given weights, for :func:`~tiltmeter.stats.jackknife.jackknife_interval`.

    f is 1/N + (1 − 1/N) f̂ of the unbiased f̂ = Σ_{i≠j} ⟨δ_i, δ_j⟩ / ((N − 1) Σ‖δ_i‖²), so an interval of one gives the other's.
    Of unit rows it is R², their squared resultant length.

    Args:
        gram: X Xᵀ of the rows, float64.

    >>> shift_shares_of_gram(torch.eye(2, dtype=torch.float64))(torch.ones(1, 2, dtype=torch.float64)).tolist()
    [0.5]
    """
    return lambda w: (w @ gram * w).sum(1) / (w.sum(1) * (w @ gram.diagonal()))


def leave_one_out_means(
    gram: Float[Tensor, "row row"], weights: Float[Tensor, "resample row"]
) -> Float[Tensor, " resample"]:
    """Mean of :func:`leave_one_out_cosines` over rows that count as much as given weights; a row of zeros counts as 0.

    Args:
        gram: X Xᵀ of the rows, float64.

    >>> leave_one_out_means(torch.tensor([[1.0, 0.6], [0.6, 1.0]]).double(), torch.ones(1, 2).double()).round(decimals=4).tolist()
    [0.6]
    """
    squares = gram.diagonal()
    sums = weights @ gram
    others = (sums * weights).sum(1, keepdim=True) - weights * (2 * sums - squares)
    cosines = (sums - weights * squares) / (others.clamp(min=0) * squares).sqrt()
    return (weights * cosines.nan_to_num(0.0, 0.0, 0.0)).sum(1) / weights.sum(1)


def mean_cosine_intervals(
    updates: Float[Tensor, "row d_model"],
    clusters: Sequence[str],
    *,
    n_splits: int = 20,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Mean cosines with v*, ``in_sample``, ``leave_one_out`` and ``split_half``, over rows, with intervals over clusters.

    v* is taken anew without each cluster: held fixed, what all rows share of its error would be missing from the interval. It
    needs Gram matrices alone.

    Args:
        updates: all with a direction.
        clusters: a name for each row; rows of one prompt share it.
        n_splits, seed: of the random halves, as :func:`split_half`.
        level: of confidence.

    Raises:
        ValueError: fewer than two rows.
    """
    updates = at_least_two_rows(updates, name="mean_cosine_intervals").cpu()
    gram = updates @ updates.T
    squares, halves = gram.diagonal(), random_halves(len(updates), n_splits, seed=seed)

    def of_all(weights: Tensor) -> Tensor:
        sums = weights @ gram
        length = (sums * weights).sum(1, keepdim=True)
        in_sample = (weights * sums / length.clamp(min=0).sqrt() / squares.sqrt()).sum(1) / weights.sum(1)
        return torch.stack([in_sample, leave_one_out_means(gram, weights)], dim=1)

    def of_halves(weights: Tensor) -> Tensor:
        total = torch.zeros_like(weights)
        for half in halves:
            parts = [weights * half, weights * (1 - half)]
            sums = [part @ gram for part in parts]
            units = [
                s / (s * part).sum(1, keepdim=True).clamp(min=0).sqrt() for s, part in zip(sums, parts, strict=True)
            ]
            total += torch.where(half == 1, units[1], units[0])
        return (weights * total / squares.sqrt()).sum(1) / weights.sum(1) / len(halves)

    in_sample, leave_one_out = jackknife_intervals(of_all, clusters, level=level, second_order=True, scale=COSINE)
    split = jackknife_interval(of_halves, clusters, level=level, scale=COSINE)
    return {"in_sample": in_sample, "leave_one_out": leave_one_out, "split_half": split}
