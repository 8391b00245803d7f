"""Vectors that steering should not work with as well as with v*: what is specific to a direction is what they don't do (C15).

Each control has the norm of the vector that it stands beside, in float64, since a longer vector does more whatever its
direction, and comes with a sentence that says what it is. :func:`norm_matched` brings any other vector to that norm. Random
vectors take a seed a draw (:func:`draw_seeds`), so that no two sites or kinds share a direction and further draws leave the
first ones as they are.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Control(NamedTuple):
    """Vectors of one kind and how they were made."""

    vectors: Float[Tensor, "vector width"]
    how: str
    norm: float

    @property
    def made(self) -> str:
        """The way it was made, with the norm."""
        return f"{self.how}, at norm {self.norm:.6g}"


def norm_matched(vectors: Float[Tensor, "vector d_model"], like: Float[Tensor, " d_model"], *, how: str) -> Control:
    """Each vector at the norm of ``like``, in float64.

    Args:
        how: what the vectors are.

    Raises:
        ValueError: a vector, or ``like``, is zero or not finite: it has no norm to give or no direction to keep.

    >>> found = norm_matched(torch.tensor([[0.0, 2.0]]), torch.tensor([3.0, 4.0]), how="SFT's v*")
    >>> found.vectors.tolist(), found.made
    ([[0.0, 5.0]], "SFT's v*, at norm 5")
    """
    exact, norm = vectors.detach().to(torch.float64), like.detach().to(torch.float64).norm()
    norms = exact.norm(dim=1)
    for name, found in (("like", norm[None]), ("vectors", norms)):
        if not (found.isfinite() & (found > 0)).all():
            raise ValueError(f"controls: {how}: expected {name} of a finite norm above 0, got {found.tolist()}")
    return Control(exact / norms[:, None] * norm, how, float(norm))


def draw_seeds(n: int, *, kind: str, site: str, seed: int = 0) -> list[int]:
    """Seeds of n draws of a kind of random vector at a site: 63 bits of the SHA-256 of all four.

    >>> draw_seeds(2, kind="random", site="layer_00")[1] == draw_seeds(9, kind="random", site="layer_00")[1]
    True
    >>> draw_seeds(1, kind="random", site="layer_00") == draw_seeds(1, kind="random", site="layer_01")
    False
    """
    names = (f"{seed}/{kind}/{site}/{i}".encode() for i in range(n))
    return [int.from_bytes(hashlib.sha256(name).digest()[:8]) >> 1 for name in names]


def random_vectors(like: Float[Tensor, " d_model"], seeds: Sequence[int]) -> Control:
    """Directions uniform on the sphere, one a seed, at the norm of ``like``.

    Raises:
        ValueError: ``like`` is zero or not finite.
    """
    return norm_matched(_normal(seeds, len(like), like), like, how="random, uniform on the sphere")


def random_in_span(
    like: Float[Tensor, " d_model"], directions: Float[Tensor, "k d_model"], seeds: Sequence[int]
) -> Control:
    """Directions uniform on the sphere of a subspace, such as that of the leading principal components of the states.

    Args:
        directions: any basis of it (:func:`tiltmeter.geometry.directions.principal_directions`); its rows need not be orthonormal.
        seeds: one a draw.

    Raises:
        ValueError: the directions are linearly dependent, or ``like`` is zero or not finite.
    """
    exact = directions.to(torch.float64)
    basis, triangle = torch.linalg.qr(exact.T)
    sizes = triangle.diagonal().abs()
    if len(exact) > exact.shape[1] or not (sizes > 1e-10 * exact.norm(dim=1)).all():
        raise ValueError(f"controls: expected linearly independent directions, got {len(exact)} that are not")
    drawn = _normal(seeds, len(exact), like) @ basis.T
    return norm_matched(drawn, like, how=f"random in the span of {len(exact)} directions")


def covariance_matched(
    like: Float[Tensor, " d_model"], rows: Float[Tensor, "row d_model"], seeds: Sequence[int]
) -> Control:
    """Directions of normal vectors with the covariance of the rows: random, yet where hidden states do vary.

    Drawn as Σ_i z_i (x_i − x̄) / √(N − 1), which has that covariance exactly and needs no d × d matrix.

    Raises:
        ValueError: fewer than two rows, equal rows, or ``like`` is zero or not finite.
    """
    exact = _centred(rows)
    drawn = _normal(seeds, len(rows), rows) @ exact / (len(rows) - 1) ** 0.5
    return norm_matched(drawn, like, how=f"random with the covariance of {len(rows)} rows")


def unrelated_contrasts(
    like: Float[Tensor, " d_model"], rows: Float[Tensor, "row d_model"], seeds: Sequence[int]
) -> Control:
    """Differences of the means of two random halves of the rows: contrasts as they are made for steering, of nothing.

    Args:
        rows: states of prompts that have nothing to do with the preference; of an odd number one is left out of each draw.
        seeds: one a draw.

    Raises:
        ValueError: fewer than two rows, equal rows, or ``like`` is zero or not finite.
    """
    exact = _centred(rows)
    half = len(rows) // 2
    signs = torch.cat([torch.ones(half), -torch.ones(half), torch.zeros(len(rows) % 2)]).to(torch.float64)
    orders = [torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    drawn = torch.stack([signs[order] for order in orders]).to(rows.device) @ exact / half
    return norm_matched(drawn, like, how=f"difference of the means of random halves of {len(rows)} unrelated prompts")


def shuffled_layers(vectors: Mapping[str, Float[Tensor, " d_model"]], *, seed: int = 0) -> dict[str, Control]:
    """For every site the v* of another one, at the norm of its own: no site keeps its vector, each is used once.

    A random cyclic permutation (Sattolo 1986). If it does as well as v*, the direction is not specific to the layer.

    Raises:
        ValueError: fewer than two sites, or a vector that is zero or not finite.
    """
    sites = list(vectors)
    if len(sites) < 2:
        raise ValueError(f"controls: shuffling layers needs at least two sites, got {sites}")
    order = torch.randperm(len(sites), generator=torch.Generator().manual_seed(seed)).tolist()
    giver = {sites[a]: sites[b] for a, b in zip(order, order[1:] + order[:1], strict=True)}
    return {site: norm_matched(vectors[giver[site]][None], vectors[site], how=f"v* of {giver[site]}") for site in sites}


def _centred(rows: Tensor) -> Tensor:
    if len(rows) < 2:
        raise ValueError(f"controls: expected at least two rows, got {len(rows)}")
    exact = rows.to(torch.float64)
    return exact - exact.mean(0)


def _normal(seeds: Sequence[int], width: int, like: Tensor) -> Tensor:
    """Drawn on the CPU, so that a seed means the same on every device."""
    drawn = [torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(drawn).to(like.device)
