"""Geometry of the rows of one matrix: spectrum, shift share and cosines, raw and under the controls."""

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltmeter.geometry.consistency import cosine, leave_one_out_cosines
from tiltmeter.geometry.spectra import Spectrum, eigen_of_gram, smaller_gram, spectrum

Variant = Literal["raw", "centred", "unit_row", "outlier_dims_removed"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
"""The rows as they are; less their mean; each divided by its norm; without the base's outlier dimensions (control C10)."""
OUTLIER_MULTIPLE = 6.0
"""Multiple of the median |mean| of all dimensions that an outlier's |mean| exceeds."""


class RowGeometry(NamedTuple):
    """Figures of the rows x_i of one matrix, whose mean is x̄."""

    spectrum: Spectrum
    """Spectrum of the matrix of rows."""
    shift_share: float
    """f = N‖x̄‖² / Σ‖x_i‖²: share of the matrix that is one constant row. Never above ``spectrum.top1_energy``."""
    cos_top_mean: float
    """|cos(u₁, x̄)|, u₁ the first right singular vector."""
    mean_cosine_in_sample: float
    """Mean of cos(x_i, x̄). Its null is about 1/√N, not 0; rows of zeros count as 0."""
    mean_cosine_leave_one_out: float
    """Mean of cos(x_i, mean of the other rows), null 0. NaN once rows are no longer kept: take a second pass
    (:func:`tiltmeter.geometry.consistency.leave_one_out_cosines`)."""
    singular_values: Float[Tensor, " k"]
    """σ₁ ≥ … of the matrix, k = min(N, d), float64; of the centred rows they are what :mod:`tiltmeter.stats.nulls` judges."""


def outlier_dims(
    base: Float[Tensor, "row d_model"], *, multiple: float = OUTLIER_MULTIPLE
) -> tuple[Int[Tensor, " outlier"], slice]:
    """Dimensions of the base's states that are outliers, and the rows that had no part in the choice.

    An outlier's |mean| over the first third of the rows is more than ``multiple`` times the median |mean| of all dimensions.
    One choice serves base, policy and update; figures without outliers are told of the other rows, so that no dimension is
    left out for what it did in the rows that are judged. Normal noise has 1 outlier in 20,000 dimensions at a multiple of 6.

    Args:
        base: the base model's rows; those of one prompt lie together.

    >>> outlier_dims(torch.tensor([[0.1, -9.0, 0.3]] * 3))
    (tensor([1]), slice(1, None, None))
    """
    n_choosing = max(1, len(base) // 3)
    size = base[:n_choosing].double().mean(0).abs()
    return (size > multiple * size.median()).nonzero()[:, 0], slice(n_choosing, None)


def row_geometry(
    rows: Float[Tensor, "row d_model"], variant: Variant = "raw", *, without: Int[Tensor, " outlier"] | None = None
) -> RowGeometry:
    """Spectrum, shift share and cosines of a variant of the rows.

    Args:
        without: dimensions that ``outlier_dims_removed`` leaves out, from :func:`outlier_dims`.

    Raises:
        ValueError: no rows, or ``outlier_dims_removed`` without the dimensions.
    """
    if not len(rows):
        raise ValueError("row_geometry: expected at least one row, got none")
    rows = rows.to(torch.float64)
    if variant == "outlier_dims_removed":
        rows = rows[:, _kept_dims(rows.shape[1], without)]
    if variant == "unit_row":
        rows = unit_rows(rows)
    if variant == "centred":
        centred = rows - rows.mean(0)
        rows = centred * _above_rounding(centred.square().sum(), rows.square().sum())
    n, d = rows.shape
    mean = torch.zeros_like(rows[0]) if variant == "centred" else rows.mean(0)
    gram = smaller_gram(rows)
    sigma, top = eigen_of_gram(gram)
    return RowGeometry(
        spectrum(sigma, n_rows=n, d_model=d),
        float(n * mean.square().sum() / gram.trace()),
        float(cosine(rows.T @ top if n <= d else top, mean).abs()),
        float((unit_rows(rows) @ mean).mean() / mean.norm()),
        math.nan if variant == "centred" or n < 2 else float(leave_one_out_cosines(rows).nan_to_num(0).mean()),
        sigma,
    )


def in_own_span(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row k"]:
    """The rows in coordinates of the space that they span, float64: k ≤ N numbers each, and every inner product as before.

    Norms, cosines, distances and singular values are those of the rows; what is told of single dimensions is lost. By X = RᵀQᵀ,
    which costs no precision, so that whatever passes over the rows many times passes over fewer numbers.
    """
    rows = rows.to(torch.float64)
    return rows if len(rows) >= rows.shape[1] else torch.linalg.qr(rows.T, mode="r").R.T


def unit_rows(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """Each row over its norm; a row of zeros stays."""
    norms = rows.norm(dim=1, keepdim=True)
    return rows / norms.where(norms > 0, 1.0)


def _kept_dims(d_model: int, without: Int[Tensor, " outlier"] | None) -> Int[Tensor, " kept"]:
    """The other dimensions than the outliers, in order.

    Raises:
        ValueError: no outliers were chosen.
    """
    if without is None:
        raise ValueError("outlier_dims_removed: expected the dimensions to leave out (outlier_dims), got none")
    keep = torch.ones(d_model, dtype=torch.bool, device=without.device)
    keep[without] = False
    return keep.nonzero()[:, 0]


def _above_rounding(centred_energy: Tensor, energy: Tensor) -> Tensor:
    """0 where subtracting the mean left nothing but rounding: equal rows, whose centred matrix is one of zeros."""
    return (centred_energy > 1e-28 * energy).to(torch.float64)
