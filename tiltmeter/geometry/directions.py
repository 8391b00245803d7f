"""Directions in hidden-state space: what the preference asks for (v, v̄), what training did (v*, u_k), what varies most (PCA).

e_t is row t of the unembedding W_U. The paper uses one word for v and v*; they are different vectors, and
:func:`tiltmeter.geometry.consistency.cosine` between them is a measurement. ``final_post_norm`` is the site that e_t lives at.
What a linear classifier reads the preference from is :func:`tiltmeter.scoring.preference_classifier.classifier_direction`;
vectors that should not work are in :mod:`tiltmeter.steering.controls`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltmeter.errors import UserError
from tiltmeter.models.layers import Unembedding
from tiltmeter.pairs.batch import PreferenceBatch

_TOKENS_AT_A_TIME = 4096


class PrincipalDirections(NamedTuple):
    """Orthonormal directions, the one with most energy first; each points to the side of the mean row."""

    directions: Float[Tensor, "k d_model"]
    energy_shares: Float[Tensor, " k"]
    """σ_i² / Σσ² of the matrix that was decomposed."""


def token_preference_vectors(
    head: Unembedding, chosen_ids: Int[Tensor, " pair"], rejected_ids: Int[Tensor, " pair"]
) -> Float[Tensor, "pair d_model"]:
    """v = e_w − e_l for each pair of tokens: the direction in which log π(w) − log π(l) grows fastest.

    For every pair's first differing tokens, :func:`tiltmeter.states.positions.divergence` gives the ids. In float32 or better;
    the constant logit scale of some families is left out.
    """
    weight = head.weight.detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight[chosen_ids].to(wide) - weight[rejected_ids].to(wide)


def sequence_preference_vectors(head: Unembedding, batch: PreferenceBatch) -> Float[Tensor, "pair d_model"]:
    """v̄ = mean_t e_{w_t} − mean_t e_{l_t} over each response's own tokens, for every pair of a batch, fillers included.

    Raises:
        UserError: the batch has no rejected responses.
    """
    if batch.layout == "chosen_only":
        raise UserError("directions: v̄ needs chosen and rejected responses; layout chosen_only has no rejected ones")
    means = mean_unembedding(head, batch.target_ids, batch.target_sequences, batch.n_sequences)
    return means[: batch.n_pairs] - means[batch.n_pairs :]


def mean_unembedding(
    head: Unembedding, token_ids: Int[Tensor, " token"], groups: Int[Tensor, " token"], n_groups: int
) -> Float[Tensor, "group d_model"]:
    """Mean of e_t over the tokens of each group, gathering a few thousand rows of W_U at a time; NaN for an empty group.

    >>> head = Unembedding(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> mean_unembedding(head, torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    weight = head.weight.detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    sums = weight.new_zeros(n_groups, weight.shape[1], dtype=wide)
    for ids, group in zip(token_ids.split(_TOKENS_AT_A_TIME), groups.split(_TOKENS_AT_A_TIME), strict=True):
        sums.index_add_(0, group, weight[ids].to(wide))
    return sums / torch.bincount(groups, minlength=n_groups)[:, None]


def steering_vector(
    base: Float[Tensor, "row d_model"], policy: Float[Tensor, "row d_model"]
) -> Float[Tensor, " d_model"]:
    """v* = (1/N) Σ (h_π − h_0), the empirical steering vector of one site and position, in float64.

    Streaming: :meth:`tiltmeter.geometry.moments.RowMoments.mean` of the update matrix.
    """
    return (policy.to(torch.float64) - base.to(torch.float64)).mean(0)


def difference_of_means(
    positive: Float[Tensor, "row_a d_model"], negative: Float[Tensor, "row_b d_model"]
) -> Float[Tensor, " d_model"]:
    """mean(positive) − mean(negative) in float64, for two sets of rows that need not be paired (chosen and rejected)."""
    return positive.to(torch.float64).mean(0) - negative.to(torch.float64).mean(0)


def principal_directions(
    rows: Float[Tensor, "row d_model"], n_directions: int, *, centred: bool
) -> PrincipalDirections:
    """The first right singular vectors, in float64.

    Args:
        n_directions: k, at most min(N, d).
        centred: subtract the mean row first (PCA proper). Without, the first direction of shifted rows is about their mean.

    Raises:
        ValueError: more directions than min(N, d).
    """
    if not 1 <= n_directions <= min(rows.shape):
        raise ValueError(f"principal_directions: expected 1 to {min(rows.shape)} directions, got {n_directions}")
    exact = rows.to(torch.float64)
    mean = exact.mean(0)
    _, sigma, vectors = torch.linalg.svd(exact - mean if centred else exact, full_matrices=False)
    directions = vectors[:n_directions]
    along = directions @ mean
    return PrincipalDirections(
        directions * torch.where(along < 0, -1.0, 1.0)[:, None],
        sigma[:n_directions].square() / sigma.square().sum(),
    )


def update_directions(
    base: Float[Tensor, "row d_model"], policy: Float[Tensor, "row d_model"], n_directions: int, *, centred: bool
) -> PrincipalDirections:
    """Top right singular vectors u_k of ΔH = H_π − H_0, each with ⟨u_k, v*⟩ ≥ 0, in float64 (:func:`principal_directions`).

    Args:
        centred: subtract v* from every row first: what is left of the update beside the constant shift. There the sign
            is free where a direction is orthogonal to v*.

    Raises:
        ValueError: more directions than min(N, d).

    >>> base, policy = torch.zeros(2, 2), torch.tensor([[-3.0, -4.0], [-3.0, -4.0]])
    >>> update_directions(base, policy, 1, centred=False).directions.round(decimals=6).tolist()
    [[-0.6, -0.8]]
    """
    return principal_directions(policy.to(torch.float64) - base.to(torch.float64), n_directions, centred=centred)
