"""Is the update one vector, or a function of the state? Models of δ = h_π − h_0 compared on prompts they have not seen (C17).

=============== ============================ ============================================================================
model           prediction of δ(x)           what it claims
=============== ============================ ============================================================================
``constant``    v*                           one shift for every prompt
``scaled``      α(x) v*, α affine in h_0     one direction, of a length that depends on the state
``rank_k``      reduced-rank regression      k directions beside the mean, of lengths that depend on the state
``affine``      W h_0 + b (ridge)            any affine function of the state
``own_mean``    its own share along v*       upper bound of one fixed direction: the length is read off δ itself
``own_rank_k``  its own share in span(u_1…k) upper bound of k fixed directions: so are the coordinates
=============== ============================ ============================================================================

R² = 1 − Σ‖δ − δ̂‖² / Σ‖δ‖², over held-out rows; about zero, not about the mean, so that ``constant`` has one as well: it is
the cross-validated shift share f. The claim "one steering vector" fails where ``affine`` is well above ``constant``. The last
two know the answer; they tell a wrong direction from a length that can't be predicted.

Everything follows from the sums n, Σh, Σδ, Σhhᵀ, Σδhᵀ, Σδδᵀ of each fold, so rows stream and are never kept.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tiltmeter.geometry.moments import RowMoments

N_FOLDS = 5
RANKS = (1, 2, 4, 8)
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Ridge penalties that are tried: of one unit of squared weight on a standardised dimension, in mean squares of a row."""


class ModelScore(NamedTuple):
    """Share of held-out updates that a model explains."""

    model: str
    r_squared: float
    """Pooled over folds: every held-out row counts once. NaN where updates are zero."""
    by_fold: list[float]
    ridge: list[float]
    """Penalty that each fold's training prompts chose, ``affine``'s for ``rank_k``; empty where a model has none."""


class _Sums(NamedTuple):
    """Mean and scatter of [h, δ] of some rows."""

    n: int
    mean: Tensor
    scatter: Tensor

    def split(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Means of h and δ; scatter of h with h, h with δ, δ with δ."""
        d = len(self.mean) // 2
        s = self.scatter
        return self.mean[:d], self.mean[d:], s[:d, :d], s[:d, d:], s[d:, d:]


class _Affine(NamedTuple):
    """δ̂ = intercept + (h − center) W Bᵀ."""

    center: Tensor
    intercept: Tensor
    weight: Tensor
    """W [d, k]."""
    basis: Tensor | None
    """B [d, k], orthonormal columns: directions that δ̂ may vary in; None: all of them, k = d."""


class UpdateModels:
    """Accumulates base states and updates, by fold, and scores every model by cross-validation over prompts.

    Memory is folds × (2 d)² float64: 5 folds of d = 512 take 42 MB, of d = 4,096 2.7 GB; scoring needs a few of them more.

    Args:
        d_model: d.
        n_folds: parts that take their turn as the held-out one, at least 3: of the others one chooses the ridge penalty.
        seed: of which prompts are together in a fold.
        device: where sums live.
    """

    def __init__(
        self, d_model: int, *, n_folds: int = N_FOLDS, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        if n_folds < 3:
            raise ValueError(f"UpdateModels: expected at least 3 folds, got {n_folds}")
        self.d_model, self.n_folds, self.seed = d_model, n_folds, seed
        self._folds = [RowMoments(2 * d_model, device=device) for _ in range(n_folds)]

    @torch.no_grad()
    def update(
        self,
        base: Float[Tensor, "row d_model"],
        policy: Float[Tensor, "row d_model"],
        groups: Sequence[str],
    ) -> None:
        """Add rows of the same tokens under both models, in any order and any cut.

        Args:
            groups: a name for each row; rows of one prompt share it, and are never on both sides of a split.

        Raises:
            ValueError: lengths or widths that differ, or rows that are not finite.
        """
        if not len(base) == len(policy) == len(groups):
            raise ValueError(
                f"UpdateModels: expected rows of one number, got {len(base)}, {len(policy)}, {len(groups)}"
            )
        h = base.to(torch.float64)
        rows = torch.cat([h, policy.to(torch.float64) - h], dim=1)
        if not rows.isfinite().all():
            raise ValueError("UpdateModels: expected finite rows; leave out those that are not")
        folds = torch.tensor([self._fold_of(group) for group in groups], device=rows.device)
        for fold, moments in enumerate(self._folds):
            mine = rows[folds == fold]
            if len(mine):
                moments.update(mine)

    @torch.no_grad()
    def scores(self, *, ranks: Sequence[int] = RANKS) -> list[ModelScore]:
        """R² of every model on the prompts of each fold in turn, fitted to all others; ranks above d are left out.

        Raises:
            ValueError: prompts in fewer than 3 folds.
        """
        filled = [fold for fold in self._folds if fold.n_rows]
        if len(filled) < 3:
            raise ValueError(f"UpdateModels: expected prompts in at least 3 folds, got {len(filled)}: too few prompts")
        ranks = [rank for rank in ranks if rank <= self.d_model]
        found: dict[str, list[tuple[float, float, float | None]]] = {}
        for held_out in range(len(filled)):
            chooser = (held_out + 1) % len(filled)
            rest = [fold for i, fold in enumerate(filled) if i not in (held_out, chooser)]
            train, test = _joined([*rest, filled[chooser]]), _joined([filled[held_out]])
            for name, result in _fold_losses(_joined(rest), _joined([filled[chooser]]), train, test, ranks).items():
                found.setdefault(name, []).append(result)
        return [_score(name, results) for name, results in found.items()]

    def _fold_of(self, group: str) -> int:
        """Fold of a prompt by a hash of its name alone, so that a stream needs no list of all prompts."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{group}".encode()).digest()[:8], "big") % self.n_folds


def _joined(folds: Sequence[RowMoments]) -> _Sums:
    joined = RowMoments(folds[0].d_model, device=folds[0].device)
    for fold in folds:
        joined.merge(fold)
    return _Sums(joined.n_rows, joined.mean(), joined.scatter())


def _fold_losses(
    inner: _Sums, chooser: _Sums, train: _Sums, test: _Sums, ranks: Sequence[int]
) -> dict[str, tuple[float, float, float | None]]:
    """For each model, Σ‖δ − δ̂‖² and Σ‖δ‖² over the held-out rows, and the penalty chosen."""
    center, v, *_ = train.split()
    nothing = v.new_zeros(len(v), 0)
    total = _loss(_Affine(center, torch.zeros_like(v), nothing, nothing), test)
    found: dict[str, tuple[float, float, float | None]] = {
        "constant": (_loss(_Affine(center, v, nothing, nothing), test), total, None)
    }
    before, after = _Ridge(inner), _Ridge(train)

    def chosen(basis_before: Tensor | None) -> float:
        return min(RIDGES, key=lambda ridge: _loss(before.fit(ridge, basis_before), chooser))

    ridge = chosen(_unit(before.v)[:, None])
    found["scaled"] = (_loss(after.fit(ridge, _unit(v)[:, None]), test), total, ridge)
    ridge = chosen(None)
    directions = after.directions(ridge)
    for rank in ranks:
        found[f"rank_{rank}"] = (_loss(after.fit(ridge, directions[:, :rank]), test), total, ridge)
    found["affine"] = (_loss(after.fit(ridge, None), test), total, ridge)
    energy = _energy(test)
    top = torch.linalg.eigh(_energy(train)).eigenvectors.flip(1)
    for name, basis in (
        {"own_mean": _unit(v)[:, None]} | {f"own_rank_{rank}": top[:, :rank] for rank in ranks}
    ).items():
        found[name] = (total - float((basis * (energy @ basis)).sum()), total, None)
    return found


class _Ridge:
    """Ridge regression of δ on standardised h, for any penalty at the price of one eigendecomposition."""

    def __init__(self, sums: _Sums) -> None:
        self.n = sums.n
        self.center, self.v, hh, hd, _ = sums.split()
        scale = (hh.diagonal() / sums.n).sqrt()[:, None]
        self.scale = scale.where(scale > 0, 1.0)
        values, self.vectors = torch.linalg.eigh(hh / self.scale / self.scale.T)
        self.values = values.clamp(min=0)[:, None]
        self.turned = self.vectors.T @ (hd / self.scale)

    def fit(self, ridge: float, basis: Tensor | None) -> _Affine:
        """The model whose slope lies in a basis, which is the whole one projected."""
        turned = self.turned if basis is None else self.turned @ basis
        weight = self.vectors @ (turned / (self.values + ridge * self.n)) / self.scale
        return _Affine(self.center, self.v, weight, basis)

    def directions(self, ridge: float) -> Tensor:
        """Directions of δ, as columns, that fitted values use, most first (right singular vectors of reduced-rank regression)."""
        fitted = self.turned.T @ (self.turned / (self.values + ridge * self.n))
        return torch.linalg.eigh(fitted).eigenvectors.flip(1)


def _loss(model: _Affine, sums: _Sums) -> float:
    """Σ‖δ − δ̂‖² over the rows that the sums are of."""
    h, delta, hh, hd, dd = sums.split()
    w, basis = model.weight, model.basis
    about_means = dd.trace() - 2 * (w * (hd if basis is None else hd @ basis)).sum() + (w * (hh @ w)).sum()
    slope = (h - model.center) @ w
    apart = delta - model.intercept - (slope if basis is None else basis @ slope)
    return float(about_means + sums.n * apart.square().sum())


def _energy(sums: _Sums) -> Tensor:
    """Matrix Σ δδᵀ of the rows."""
    _, delta, _, _, dd = sums.split()
    return dd + sums.n * torch.outer(delta, delta)


def _unit(v: Tensor) -> Tensor:
    norm = v.norm()
    return v / norm.where(norm > 0, 1.0)


def _score(model: str, results: Sequence[tuple[float, float, float | None]]) -> ModelScore:
    def share(lost: float, total: float) -> float:
        return 1 - lost / total if total > 0 else float("nan")

    lost, totals, ridges = zip(*results, strict=True)
    return ModelScore(
        model,
        share(sum(lost), sum(totals)),
        [share(*pair) for pair in zip(lost, totals, strict=True)],
        [ridge for ridge in ridges if ridge is not None],
    )
