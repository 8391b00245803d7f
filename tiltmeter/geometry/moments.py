"""Streaming statistics of rows of hidden states: everything the spectra need, mergeable over batches and processes.

Up to ``max_rows_kept`` rows are kept as they are, which is smaller than a d × d matrix and exact in every variant. Beyond,
they are folded into float64 mean and scatter S = Σ (x − x̄)(x − x̄)ᵀ, and memory no longer grows. Merging follows Chan,
Golub & LeVeque (1983): S = S_a + S_b + n_a n_b / n · (x̄_b − x̄_a)(x̄_b − x̄_a)ᵀ, which survives a mean of 1e6 at a deviation
of 1 where Σ x xᵀ − n x̄ x̄ᵀ would lose half of its digits.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltmeter.geometry.rows import RowGeometry, Variant, kept_dims, moment_geometry, row_geometry, unit_rows

Matrix = Literal["delta", "base", "policy"]
MATRICES: tuple[Matrix, ...] = get_args(Matrix)

DEFAULT_ROWS_KEPT = 1024
"""Rows kept however narrow they are; wider rows are kept up to as many as they are wide."""

_ROWS_PER_FOLD = 1024
"""Rows that are folded at a time: enough that one product per d × d matrix is worth it, few enough in float64."""


class _Moments(NamedTuple):
    """Count, mean and scatter about the mean. ``add`` and ``merge`` take the scatter over and change it in place."""

    n: int
    mean: Tensor
    scatter: Tensor | None

    @classmethod
    def of_nothing(cls, d_model: int, with_scatter: bool, device: torch.device) -> "_Moments":
        mean = torch.zeros(d_model, dtype=torch.float64, device=device)
        return cls(0, mean, torch.zeros(d_model, d_model, dtype=torch.float64, device=device) if with_scatter else None)

    def add(self, rows: Tensor) -> "_Moments":
        """Add float64 rows: Chan's term between the means is one more row of the product that the others need."""
        if not len(rows):
            return self
        mean = rows.mean(0)
        n, apart = self.n + len(rows), mean - self.mean
        if self.scatter is not None:
            centred = rows.new_empty(len(rows) + 1, rows.shape[1])
            torch.sub(rows, mean, out=centred[:-1])
            torch.mul(apart, math.sqrt(self.n * len(rows) / n), out=centred[-1])
            self.scatter.addmm_(centred.T, centred)
        return _Moments(n, self.mean + apart * (len(rows) / n), self.scatter)

    def merge(self, other: "_Moments") -> "_Moments":
        n = self.n + other.n
        if n == 0:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.n / n)
        if self.scatter is None or other.scatter is None:
            return _Moments(n, mean, None)
        scatter = self.scatter.add_(other.scatter).addr_(apart, apart, alpha=self.n * other.n / n)
        return _Moments(n, mean, scatter)

    def all_reduce(self, n: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> "_Moments":
        """Chan's merge of all ranks at once, by sums alone: each first moves its scatter to the common mean."""
        mean = sum_over_ranks(self.mean * (self.n / max(n, 1)))
        if self.scatter is None:
            return _Moments(n, mean, None)
        apart = self.mean - mean
        return _Moments(n, mean, sum_over_ranks(torch.addr(self.scatter, apart, apart, alpha=self.n)))

    def to(self, device: torch.device) -> "_Moments":
        return _Moments(self.n, self.mean.to(device), None if self.scatter is None else self.scatter.to(device))


class _Folded(NamedTuple):
    """Moments of the rows and of the rows over their norms."""

    plain: _Moments
    unit: _Moments

    @classmethod
    def of_nothing(cls, d_model: int, unit_scatter: bool, device: torch.device) -> "_Folded":
        return cls(_Moments.of_nothing(d_model, True, device), _Moments.of_nothing(d_model, unit_scatter, device))

    def add(self, rows: Tensor) -> "_Folded":
        exact = rows.to(torch.float64)
        return _Folded(self.plain.add(exact), self.unit.add(unit_rows(exact)))

    def merge(self, other: "_Folded") -> "_Folded":
        return _Folded(self.plain.merge(other.plain), self.unit.merge(other.unit))

    def all_reduce(self, n: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> "_Folded":
        return _Folded(self.plain.all_reduce(n, sum_over_ranks), self.unit.all_reduce(n, sum_over_ranks))

    def to(self, device: torch.device) -> "_Folded":
        return _Folded(self.plain.to(device), self.unit.to(device))


class RowMoments:
    """Accumulates the rows of one [N, d] matrix, in any order and any cut.

    Args:
        d_model: d.
        unit_rows: also answer for ``unit_row`` after rows are no longer kept; costs a second d × d matrix then.
        max_rows_kept: None: the larger of d and ``DEFAULT_ROWS_KEPT``; 0: fold rows at once.
        device: where statistics live; rows are moved there.
    """

    def __init__(
        self,
        d_model: int,
        *,
        unit_rows: bool = False,
        max_rows_kept: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.d_model = d_model
        self.unit_rows = unit_rows
        self.max_rows_kept = max(d_model, DEFAULT_ROWS_KEPT) if max_rows_kept is None else max_rows_kept
        self.device = torch.device(device)
        self._kept: list[Tensor] = [torch.empty(0, d_model, device=self.device)]
        """All rows seen; once some are folded, those that wait for the next fold."""
        self._folded: _Folded | None = None

    @property
    def n_rows(self) -> int:
        """Rows seen so far."""
        return sum(map(len, self._kept)) + (0 if self._folded is None else self._folded.plain.n)

    @property
    def keeps_rows(self) -> bool:
        """True while every row is still here."""
        return self._folded is None

    @property
    def rows(self) -> Float[Tensor, "row d_model"]:
        """The rows, in the order they came.

        Raises:
            ValueError: they have been folded.
        """
        if self._folded is not None:
            raise ValueError(f"RowMoments: rows beyond max_rows_kept={self.max_rows_kept} were folded and are gone")
        return self._joined()

    @torch.no_grad()
    def update(self, rows: Float[Tensor, "row d_model"]) -> None:
        """Add further rows; half precision is widened to float32 first.

        Raises:
            ValueError: rows of another width.
        """
        if rows.shape[1] != self.d_model:
            raise ValueError(f"RowMoments: expected rows of width {self.d_model}, got {rows.shape[1]}")
        rows = rows.to(self.device, torch.promote_types(rows.dtype, torch.float32), copy=True)
        self._kept.append(rows)
        waiting = sum(map(len, self._kept))
        if waiting > (self.max_rows_kept if self._folded is None else _ROWS_PER_FOLD - 1):
            self._fold()

    def merge(self, other: "RowMoments") -> None:
        """Add all rows that another accumulator has seen."""
        if other._folded is None:
            self.update(other.rows)
        else:
            self._folded = self._fold().merge(other._fold().to(self.device))

    def all_reduce(self, sum_over_ranks: Callable[[Tensor], Tensor], *, rank: int, world_size: int) -> "RowMoments":
        """The accumulator of all processes' rows, the same on each; a collective: every rank has to call it.

        Args:
            sum_over_ranks: returns the sum of a float64 tensor over all ranks; it may overwrite its argument.
            rank, world_size: of this process; rows are ordered by rank.
        """
        counts = torch.zeros(world_size, 2, dtype=torch.float64, device=self.device)
        counts[rank, 0], counts[rank, 1] = self.n_rows, float(not self.keeps_rows)
        counts = sum_over_ranks(counts)
        ends = counts[:, 0].cumsum(0).long().tolist()
        merged = RowMoments(
            self.d_model, unit_rows=self.unit_rows, max_rows_kept=self.max_rows_kept, device=self.device
        )
        if ends[-1] <= self.max_rows_kept and not counts[:, 1].any():
            table = torch.zeros(ends[-1], self.d_model, dtype=torch.float64, device=self.device)
            table[ends[rank] - self.n_rows : ends[rank]] = self.rows
            merged._kept = [sum_over_ranks(table)]
        else:
            merged._folded = self._fold().all_reduce(ends[-1], sum_over_ranks)
        return merged

    def mean(self) -> Float[Tensor, " d_model"]:
        """x̄ in float64; of an update matrix it is v*, the empirical steering vector. NaN without rows."""
        return self.rows.to(torch.float64).mean(0) if self._folded is None else self._fold().plain.mean

    def scatter(self) -> Float[Tensor, "d_model d_model"]:
        """Σ (x − x̄)(x − x̄)ᵀ in float64: N − 1 times the rows' covariance. Rows that are still kept stay kept."""
        if self._folded is None:
            centred = self.rows.to(torch.float64) - self.mean()
            return centred.T @ centred
        scatter = self._fold().plain.scatter
        assert scatter is not None
        return scatter.clone()

    def geometry(self, variant: Variant = "raw", *, without: Int[Tensor, " outlier"] | None = None) -> RowGeometry:
        """Spectrum, shift share and cosines of a variant of the rows.

        Args:
            without: dimensions that ``outlier_dims_removed`` leaves out, from :func:`tiltmeter.geometry.rows.outlier_dims`.

        Raises:
            ValueError: no rows yet, or ``unit_row`` of folded rows without ``unit_rows=True``.
        """
        if self._folded is None:
            return row_geometry(self.rows, variant, without=without)
        moments, unit = self._fold()
        if variant == "unit_row":
            if unit.scatter is None:
                raise ValueError("RowMoments: unit_row of folded rows was not kept; create it with unit_rows=True")
            moments = unit
        assert moments.scatter is not None
        mean, scatter = moments.mean, moments.scatter
        unit_mean: Tensor | None = unit.mean
        if variant == "outlier_dims_removed":  # norms of rows without some dimensions are not known from moments
            kept = kept_dims(len(mean), without).to(mean.device)
            mean, scatter, unit_mean = mean[kept], scatter[kept][:, kept], None
        return moment_geometry(moments.n, mean=mean, scatter=scatter, unit_mean=unit_mean, centred=variant == "centred")

    def _fold(self) -> "_Folded":
        """Stop keeping rows, and fold those that wait."""
        if self._folded is None or self._kept:
            folded = self._folded or _Folded.of_nothing(self.d_model, self.unit_rows, self.device)
            for rows in self._joined().split(_ROWS_PER_FOLD):
                folded = folded.add(rows)
            self._folded, self._kept = folded, []
        return self._folded

    def _joined(self) -> Tensor:
        widest = torch.float64 if any(x.dtype == torch.float64 for x in self._kept) else torch.float32
        self._kept = [torch.cat([x.to(widest) for x in self._kept])]
        return self._kept[0]


class UpdateMoments:
    """The matrices of one site and position: ``delta`` = ΔH = H_policy − H_base, ``base`` and ``policy``.

    Args:
        d_model, unit_rows, max_rows_kept, device: as for :class:`RowMoments`.
        matrices: which to accumulate.
    """

    def __init__(
        self,
        d_model: int,
        *,
        matrices: tuple[Matrix, ...] = MATRICES,
        unit_rows: bool = False,
        max_rows_kept: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.of: dict[Matrix, RowMoments] = {
            name: RowMoments(d_model, unit_rows=unit_rows, max_rows_kept=max_rows_kept, device=device)
            for name in matrices
        }

    def update(self, base: Float[Tensor, "row d_model"], policy: Float[Tensor, "row d_model"]) -> None:
        """Add the rows of the same tokens under both models; their difference is taken in float32 or better."""
        wide = torch.promote_types(torch.promote_types(base.dtype, policy.dtype), torch.float32)
        base, policy = base.to(self.device, wide), policy.to(self.device, wide)
        for name, moments in self.of.items():
            moments.update({"delta": policy - base, "base": base, "policy": policy}[name])

    def merge(self, other: "UpdateMoments") -> None:
        """Add all rows that another accumulator of the same matrices has seen."""
        for name, moments in self.of.items():
            moments.merge(other.of[name])

    def all_reduce(self, sum_over_ranks: Callable[[Tensor], Tensor], *, rank: int, world_size: int) -> "UpdateMoments":
        """Sum each matrix over all processes (:meth:`RowMoments.all_reduce`)."""
        merged = UpdateMoments(0, matrices=(), device=self.device)
        for name, moments in self.of.items():
            merged.of[name] = moments.all_reduce(sum_over_ranks, rank=rank, world_size=world_size)
        return merged
