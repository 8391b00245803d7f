"""Mean and scatter of rows of hidden states, streamed in float64 and mergeable; memory doesn't grow with rows.

Merging follows Chan, Golub & LeVeque (1983): S = S_a + S_b + n_a n_b / n · (x̄_b − x̄_a)(x̄_b − x̄_a)ᵀ, which survives a mean of 1e6
at a deviation of 1 where Σ x xᵀ − n x̄ x̄ᵀ would lose half of its digits.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

_ROWS_AT_A_TIME = 1024
"""Rows that are added at a time: enough that one product per d × d matrix is worth it, few enough in float64."""


class RowMoments:
    """Accumulates the rows of one [N, d] matrix, in any order and any cut.

    Args:
        d_model: d.
        device: where sums live; rows are moved there.
    """

    def __init__(self, d_model: int, *, device: torch.device | str = "cpu") -> None:
        self.d_model, self.device, self.n_rows = d_model, torch.device(device), 0
        self._mean = torch.zeros(d_model, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(d_model, d_model, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, rows: Float[Tensor, "row d_model"]) -> None:
        """Add further rows.

        Raises:
            ValueError: rows of another width.
        """
        if rows.shape[1] != self.d_model:
            raise ValueError(f"RowMoments: expected rows of width {self.d_model}, got {rows.shape[1]}")
        for part in rows.to(self.device).split(_ROWS_AT_A_TIME):
            if len(part):
                self._add(part.to(torch.float64))

    def _add(self, rows: Tensor) -> None:
        """Add float64 rows: Chan's term between the means is one more row of the product that the others need."""
        mean = rows.mean(0)
        n, apart = self.n_rows + len(rows), mean - self._mean
        centred = rows.new_empty(len(rows) + 1, self.d_model)
        torch.sub(rows, mean, out=centred[:-1])
        torch.mul(apart, math.sqrt(self.n_rows * len(rows) / n), out=centred[-1])
        self._scatter.addmm_(centred.T, centred)
        self._mean = self._mean + apart * (len(rows) / n)
        self.n_rows = n

    def merge(self, other: "RowMoments") -> None:
        """Add all rows that another accumulator has seen."""
        n = self.n_rows + other.n_rows
        if n:
            apart = other._mean.to(self.device) - self._mean
            self._scatter.add_(other._scatter.to(self.device))
            self._scatter.addr_(apart, apart, alpha=self.n_rows * other.n_rows / n)
            self._mean = self._mean + apart * (other.n_rows / n)
            self.n_rows = n

    def mean(self) -> Float[Tensor, " d_model"]:
        """x̄ in float64; zeros without rows."""
        return self._mean.clone()

    def scatter(self) -> Float[Tensor, "d_model d_model"]:
        """Σ (x − x̄)(x − x̄)ᵀ in float64: N − 1 times the rows' covariance."""
        return self._scatter.clone()
