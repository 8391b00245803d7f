"""The energy distance: how far apart two clouds of paired points are, as clouds, with weights for resampling pairs."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def energy_kernel(x: Float[Tensor, "pair d_model"], y: Float[Tensor, "pair d_model"]) -> Float[Tensor, "pair pair"]:
    """K_ij = ‖x_i − y_j‖ + ‖y_i − x_j‖ − ‖x_i − x_j‖ − ‖y_i − y_j‖ in float64, 0 where i = j.

    Its mean over i ≠ j is the energy distance 2E‖X−Y‖ − E‖X−X'‖ − E‖Y−Y'‖ (Székely & Rizzo 2013) in the units of the points:
    0 when both clouds are of one distribution, in any number of dimensions. Points of one pair are not independent, so they
    are never compared with each other; the estimate is unbiased and can be below 0.
    """
    x, y = x.to(torch.float64), y.to(torch.float64)
    centre = x.mean(0)  # distances are differences of squares: large common parts would cost digits
    x, y = x - centre, y - centre
    across = torch.cdist(x, y)
    kernel = across + across.T - torch.cdist(x, x) - torch.cdist(y, y)
    return kernel.fill_diagonal_(0.0)


def kernels_after_shift(
    base: Float[Tensor, "pair d_model"],
    update: Float[Tensor, "pair d_model"],
    clusters: Sequence[str],
    *,
    n_splits: int,
    seed: int = 0,
) -> tuple[Float[Tensor, "pair pair"], Float[Tensor, "pair pair"], Float[Tensor, "pair pair"]]:
    """Kernels of base and policy, before and after the base is moved by the mean update of other prompts.

    The mean update is always of prompts that are not in the clouds compared: each of the random halves of the prompts gives one
    for the other half; points are compared inside a half only. Sums over the first two are proportional to energy distances.

    Args:
        update: policy less base.
        clusters: prompt of each pair.

    Returns:
        apart, moved, and the number of splits in which two pairs are in one half.

    Raises:
        ValueError: see :func:`random_halves`.
    """
    policy = base + update
    same = [half[:, None] == half for half in random_halves(clusters, n_splits=n_splits, seed=seed)]
    n_compared = torch.stack(same).sum(0).double().fill_diagonal_(0.0)
    apart = energy_kernel(base, policy) * n_compared
    moved = torch.zeros_like(apart)
    for mates in same:
        others = (~mates).double()
        moved += energy_kernel(base + others @ update / others.sum(1, keepdim=True), policy) * mates
    return apart, moved, n_compared


def random_halves(clusters: Sequence[str], *, n_splits: int, seed: int = 0) -> Bool[Tensor, "split row"]:
    """Marks the rows of the first half for several random splits; rows of one cluster (prompt) stay together.

    Raises:
        ValueError: fewer than two clusters.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    if len(names) < 2:
        raise ValueError(f"random_halves: expected rows of at least two clusters, got {len(names)}")
    index = torch.tensor([names[name] for name in clusters])
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(len(names), generator=generator) for _ in range(n_splits)])
    return (ranks < len(names) // 2)[:, index]
