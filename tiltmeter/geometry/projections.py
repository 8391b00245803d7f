"""Projections of hidden states onto a preference direction, before and after training, and sides of the hyperplane."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltmeter.models.layers import Unembedding
from tiltmeter.stats.jackknife import Interval, cluster_mean_interval
from tiltmeter.stats.proportions import share_interval


class ProjectionChange(NamedTuple):
    """Projections of the same pairs under both models, in activation units: ⟨h, v⟩ / ‖v‖."""

    base: Float[Tensor, " pair"]
    policy: Float[Tensor, " pair"]
    change: Float[Tensor, " pair"]
    """policy − base."""


class ProjectionSummary(NamedTuple):
    """Means over pairs; of what changed, with intervals over whole clusters (prompts)."""

    base: float
    policy: float
    change: Interval
    """Mean paired difference, with its interval."""
    share_grown: Interval
    """Share of pairs whose projection grew."""


def inner_products(hidden: Float[Tensor, "pair d_model"], v: Float[Tensor, "#pair d_model"]) -> Float[Tensor, " pair"]:
    """⟨h, v⟩ in float64; at ``final_post_norm`` with v = e_w − e_l it is the difference of two logits.

    Args:
        v: one vector a pair, or one [1, d_model] for all.
    """
    return (hidden.to(torch.float64) * v.to(torch.float64)).sum(-1)


def projections(hidden: Float[Tensor, "pair d_model"], v: Float[Tensor, "#pair d_model"]) -> Float[Tensor, " pair"]:
    """⟨h, v⟩ / ‖v‖ in activation units; NaN where v is zero.

    >>> projections(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])).tolist()
    [4.0]
    """
    return inner_products(hidden, v) / v.to(torch.float64).norm(dim=-1)


def projection_change(
    base: Float[Tensor, "pair d_model"], policy: Float[Tensor, "pair d_model"], v: Float[Tensor, "#pair d_model"]
) -> ProjectionChange:
    """Projections under both models and their change, which is the projection of the update itself (less cancellation)."""
    update = policy.to(torch.float64) - base.to(torch.float64)
    return ProjectionChange(projections(base, v), projections(policy, v), projections(update, v))


def summarize_projections(
    change: ProjectionChange, clusters: Sequence[str], *, level: float = 0.95
) -> ProjectionSummary:
    """Means, and intervals over clusters of the paired change and of the share that grew; pairs whose v is zero are left out.

    Args:
        clusters: a name for each pair; pairs of one prompt share it.

    Raises:
        ValueError: lengths that differ, or no pair with a projection.
    """
    there = ~change.change.isnan().cpu()
    if len(clusters) != len(there):
        raise ValueError(f"summarize_projections: expected {len(there)} cluster names, got {len(clusters)}")
    names = [name for name, kept in zip(clusters, there.tolist(), strict=True) if kept]

    moved = change.change.cpu()[there]
    grown = (moved > 0).to(torch.float64).tolist()
    base, policy = (float(values.cpu()[there].mean()) for values in (change.base, change.policy))
    return ProjectionSummary(
        base,
        policy,
        cluster_mean_interval(moved.tolist(), names, level=level),
        share_interval(grown, names, level=level),
    )


def logit_gaps(
    hidden: Float[Tensor, "pair d_model"],
    head: Unembedding,
    chosen_ids: Int[Tensor, " pair"],
    rejected_ids: Int[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    """log π(w) − log π(l) in nats, from ``final_post_norm`` states: only two rows of W_U a pair, since the normaliser cancels.

    Of the base model's states it is Δ_ref.
    """
    ids = torch.stack([chosen_ids, rejected_ids])
    logits = (head.weight.detach()[ids].to(torch.float64) * hidden.to(torch.float64)).sum(-1)
    if head.bias is not None:
        logits = logits + head.bias.detach()[ids].to(torch.float64)
    logits = logits * head.scale
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    return logits[0] - logits[1]


def hyperplane_distances(
    hidden: Float[Tensor, "pair d_model"],
    v: Float[Tensor, "#pair d_model"],
    reference_gaps: Float[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    """Signed distance (⟨h, v⟩ − Δ_ref) / ‖v‖ to H_v = {h : ⟨h, v⟩ = Δ_ref}, in activation units; above 0: preferred side.

    With v = e_w − e_l at ``diverge`` and ``final_post_norm``, and a plain unembedding (no bias, scale or cap), the base model
    lies on the hyperplane by construction, and the policy is on the preferred side exactly when its log-odds grew.

    Args:
        reference_gaps: Δ_ref = log π₀(w) − log π₀(l) in nats (:func:`logit_gaps`).
    """
    return (inner_products(hidden, v) - reference_gaps.to(torch.float64)) / v.to(torch.float64).norm(dim=-1)


def share_preferred(distances: Float[Tensor, " pair"]) -> float:
    """Share of pairs on the preferred side; pairs without a distance are left out, NaN without any.

    >>> share_preferred(torch.tensor([0.5, -1.0, float("nan"), 2.0]))
    0.6666666666666666
    """
    there = distances[~distances.isnan()]
    return int((there > 0).sum()) / len(there) if len(there) else float("nan")
