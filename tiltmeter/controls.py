"""Vectors that steering should not work with as well as with v*: what is specific to a direction is what they don't do (C15).

Each control has the norm of the vector that it stands beside, in float64, since a longer vector does more whatever its
direction, and comes with a sentence that says what it is. Those of other runs (SFT's v*, v* of shuffled labels) and v̄ are
brought to that norm by :func:`norm_matched`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tiltmeter.layers import Unembedding

N_RANDOM = 20
"""Random vectors of a kind (METHOD C15): enough that the largest of them is a 95 % bound."""


class Control(NamedTuple):
    """Vectors of one kind and how they were made."""

    vectors: Float[Tensor, "vector width"]
    provenance: str


def norm_matched(
    vectors: Float[Tensor, "vector d_model"], like: Float[Tensor, " d_model"], *, provenance: str
) -> Control:
    """Each vector at the norm of ``like``, in float64.

    Args:
        provenance: what the vectors are; the norm is added to it.

    Raises:
        ValueError: a vector, or ``like``, is zero or not finite: it has no norm to give or no direction to keep.

    >>> norm_matched(torch.tensor([[0.0, 2.0]]), torch.tensor([3.0, 4.0]), provenance="SFT's v*")
    Control(vectors=tensor([[0., 5.]], dtype=torch.float64), provenance="SFT's v*, at norm 5")
    """
    exact, norm = vectors.to(torch.float64), like.to(torch.float64).norm()
    norms = exact.norm(dim=1)
    for name, found in (("like", norm[None]), ("vectors", norms)):
        if not (found.isfinite() & (found > 0)).all():
            raise ValueError(f"controls: {provenance}: expected {name} of a finite norm above 0, got {found.tolist()}")
    return Control(exact / norms[:, None] * norm, f"{provenance}, at norm {float(norm):.6g}")


def random_vectors(like: Float[Tensor, " d_model"], n: int = N_RANDOM, *, seed: int = 0) -> Control:
    """Directions uniform on the sphere, at the norm of ``like``.

    Raises:
        ValueError: ``like`` is zero or not finite.
    """
    return norm_matched(
        _normal(n, len(like), seed, like), like, provenance=f"random, uniform on the sphere, seed {seed}"
    )


def random_in_span(
    like: Float[Tensor, " d_model"], directions: Float[Tensor, "k d_model"], n: int = N_RANDOM, *, seed: int = 0
) -> Control:
    """Directions uniform on the sphere of a subspace, such as that of the leading principal components of the states.

    Args:
        directions: any basis of it (:func:`tiltmeter.directions.principal_directions`); its rows need not be orthonormal.

    Raises:
        ValueError: the directions are linearly dependent, or ``like`` is zero or not finite.
    """
    exact = directions.to(torch.float64)
    basis, triangle = torch.linalg.qr(exact.T)
    sizes = triangle.diagonal().abs()
    if len(exact) > exact.shape[1] or not (sizes > 1e-10 * exact.norm(dim=1)).all():
        raise ValueError(f"controls: expected linearly independent directions, got {len(exact)} that are not")
    drawn = _normal(n, len(exact), seed, like) @ basis.T
    return norm_matched(drawn, like, provenance=f"random in the span of {len(exact)} directions, seed {seed}")


def covariance_matched(
    like: Float[Tensor, " d_model"], rows: Float[Tensor, "row d_model"], n: int = N_RANDOM, *, seed: int = 0
) -> Control:
    """Directions of normal vectors with the covariance of the rows: random, yet where hidden states do vary.

    Drawn as Σ_i z_i (x_i − x̄) / √(N − 1), which has that covariance exactly and needs no d × d matrix.

    Raises:
        ValueError: fewer than two rows, equal rows, or ``like`` is zero or not finite.
    """
    if len(rows) < 2:
        raise ValueError(f"controls: expected at least two rows, got {len(rows)}")
    exact = rows.to(torch.float64)
    drawn = _normal(n, len(rows), seed, rows) @ (exact - exact.mean(0)) / (len(rows) - 1) ** 0.5
    return norm_matched(drawn, like, provenance=f"random with the covariance of {len(rows)} rows, seed {seed}")


def covariance_matched_from_scatter(
    like: Float[Tensor, " d_model"], scatter: Float[Tensor, "d_model d_model"], n: int = N_RANDOM, *, seed: int = 0
) -> Control:
    """The same from a covariance matrix up to scale, once rows are gone (:meth:`tiltmeter.moments.RowMoments.scatter`).

    Raises:
        ValueError: the matrix is zero or not finite, or ``like`` is.
    """
    exact = scatter.to(torch.float64)
    if not exact.isfinite().all():
        raise ValueError("controls: expected a finite scatter matrix")
    values, vectors = torch.linalg.eigh(exact)
    drawn = _normal(n, len(exact), seed, exact) * values.clamp(min=0).sqrt() @ vectors.T
    return norm_matched(drawn, like, provenance=f"random with a given covariance, seed {seed}")


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
    return {
        site: norm_matched(vectors[giver[site]][None], vectors[site], provenance=f"v* of {giver[site]}, seed {seed}")
        for site in sites
    }


def logit_bias(head: Unembedding, v: Float[Tensor, " d_model"]) -> Control:
    """scale · W_U v: what to add to all logits, in front of a soft cap, to say the same without any hidden state.

    For v at ``final_post_norm`` it *is* steering: logits(λ) = z + λ W_U v (METHOD §1). For v of a layer it is what v would do if
    the layers above passed it on unchanged. Its norm follows from v and is not matched. In float32 or better.

    >>> logit_bias(Unembedding(torch.tensor([[1.0, 0.0], [0.0, 2.0]])), torch.tensor([3.0, 4.0])).vectors.tolist()
    [[3.0, 8.0]]
    """
    wide = torch.promote_types(torch.promote_types(head.weight.dtype, v.dtype), torch.float32)
    bias = head.scale * (head.weight.detach().to(wide) @ v.to(head.weight.device, wide))
    return Control(bias[None], "logit bias W_U v")


def _normal(n: int, width: int, seed: int, like: Tensor) -> Tensor:
    """Drawn on the CPU, so that a seed means the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64).to(like.device)
