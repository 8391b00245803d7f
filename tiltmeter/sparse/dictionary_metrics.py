"""Numbers by which dictionaries are judged: how few features are active, what they explain, whether they are the true ones."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

DENSITY_EDGES = tuple(float(10.0**e) for e in np.arange(-6, 0.01, 0.25))
"""Edges of the density histogram: four to a power of ten, from one token in a million to all."""


class DictionaryStatistics:
    """Streams what a dictionary does to states: how often each feature is active, and how much of the variance is explained.

    Sums are float64 and taken about the running mean (Chan, Golub & LeVeque 1983), so that a mean far from 0 costs no digits.

    Args:
        d_model: width of the states.
        width: number of features.
    """

    def __init__(self, d_model: int, width: int) -> None:
        self.n_rows = 0
        self.n_active = torch.zeros(width, dtype=torch.long)
        """Rows at which each feature was active."""
        self._mean = torch.zeros(d_model, dtype=torch.float64)
        self._scatter = self._residual = 0.0

    @torch.no_grad()
    def update(
        self,
        states: Float[Tensor, "row d_model"],
        features: Float[Tensor, "row width"],
        reconstruction: Float[Tensor, "row d_model"],
    ) -> None:
        """Add further rows."""
        n = len(states)
        if not n:
            return
        rows = states.double().cpu()
        mean = rows.mean(0)
        apart, whole = mean - self._mean, self.n_rows + n
        self._scatter += float((rows - mean).square().sum()) + float(apart.square().sum()) * self.n_rows * n / whole
        self._residual += float((rows - reconstruction.double().cpu()).square().sum())
        self._mean = self._mean + apart * (n / whole)
        self.n_rows = whole
        self.n_active += (features > 0).sum(0).cpu()

    @property
    def l0(self) -> float:
        """Mean number of features active at a row; NaN without rows."""
        return float(self.n_active.sum()) / self.n_rows if self.n_rows else float("nan")

    @property
    def explained_variance(self) -> float:
        """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² over all rows; NaN where the states don't vary."""
        return 1 - self._residual / self._scatter if self._scatter > 0 else float("nan")

    @property
    def dead_share(self) -> float:
        """Share of features that were active at no row; NaN without rows."""
        return float((self.n_active == 0).double().mean()) if self.n_rows else float("nan")

    def densities(self) -> Float[Tensor, " width"]:
        """Share of rows at which each feature is active, float64."""
        return self.n_active.double() / max(1, self.n_rows)

    def density_histogram(self) -> tuple[Int[Tensor, " bin"], float]:
        """Features by density, counted between :data:`DENSITY_EDGES`, and the share that is rarer than the first or dead."""
        density = self.densities()
        counts = torch.histogram(density, torch.tensor(DENSITY_EDGES, dtype=torch.float64)).hist.long()
        return counts, float((density < DENSITY_EDGES[0]).double().mean())

    def density_table(self) -> str:
        """The histogram as CSV: shares of rows from … to, features; the first line holds those that are rarer, and the dead."""
        counts, below = self.density_histogram()
        features = [round(below * len(self.n_active)), *counts.tolist()]
        lines = zip((0.0, *DENSITY_EDGES), DENSITY_EDGES, features, strict=False)
        return "from,to,features\n" + "".join(f"{low:.3g},{high:.3g},{n}\n" for low, high, n in lines)


def loss_recovered(clean: float, spliced: float, ablated: float) -> float:
    """Share of the loss kept when states are replaced by their reconstruction: (L_ablated − L_spliced) / (L_ablated − L_clean).

    Args:
        clean: the model's loss.
        spliced: with SAE(x) in the place of x at the site.
        ablated: with 0 in the place of x. Any unit, all three the same.

    Returns:
        1 where nothing is lost, 0 where the reconstruction is worth no more than nothing; NaN where ablation costs nothing.

    >>> loss_recovered(2.0, 2.5, 4.0)
    0.75
    """
    return (ablated - spliced) / (ablated - clean) if ablated != clean else float("nan")


class Matched(NamedTuple):
    """True directions and the decoder rows that they were found as, one to one."""

    planted: Int[Tensor, " pair"]
    found: Int[Tensor, " pair"]
    cosines: Float[Tensor, " pair"]

    @property
    def mean_max_cosine(self) -> float:
        """Mean cosine over pairs; 1: the dictionary is the planted one."""
        return float(self.cosines.mean())


def match_dictionary(decoder: Float[Tensor, "width d_model"], planted: Float[Tensor, "planted d_model"]) -> Matched:
    """Pair each planted direction with a decoder row so that the sum of cosines is largest (Hungarian method), in float64.

    Cosines keep their sign: features are never negative, so an opposite row is another direction.
    """
    rows, directions = (
        torch.nn.functional.normalize(each.detach().double().cpu(), dim=1) for each in (decoder, planted)
    )
    cosines = directions @ rows.t()
    first, second = linear_sum_assignment(cosines.numpy(), maximize=True)
    planted_index, found_index = torch.from_numpy(first).long(), torch.from_numpy(second).long()
    return Matched(planted_index, found_index, cosines[planted_index, found_index])


def activation_f1(
    features: Float[Tensor, "row width"], planted: Float[Tensor, "row planted"], matched: Matched
) -> Float[Tensor, " pair"]:
    """F1 of "active at this row" of each matched pair: 2 TP / (2 TP + FP + FN), float64; NaN where neither ever is."""
    found, true = features[:, matched.found] > 0, planted[:, matched.planted] > 0
    hits = (found & true).sum(0).double()
    return 2 * hits / (found.sum(0) + true.sum(0))
