"""The energy distance: how far apart two clouds of paired points are, as clouds, with weights for resampling pairs."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
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
    base: Float[Tensor, "pair d_model"], update: Float[Tensor, "pair d_model"], clusters: Sequence[str]
) -> tuple[Float[Tensor, "pair pair"], Float[Tensor, "pair pair"], Float[Tensor, "pair pair"]]:
    """Kernels of base and policy, before and after the base is moved by the mean update of other prompts.

    Where points i and j are compared, the base is moved by the mean of the updates of all prompts but theirs, so no prompt is
    explained by itself. Prompts are never compared with themselves. Sums over a kernel are proportional to energy distances.

    Args:
        update: policy less base.
        clusters: prompt of each pair.

    Returns:
        apart and moved, both 0 where two pairs are of one prompt; and 1 where they are of different ones.

    Raises:
        ValueError: fewer than three prompts.
    """
    names = list(dict.fromkeys(clusters))
    if len(names) < 3:
        raise ValueError(f"kernels_after_shift: expected rows of at least three clusters, got {len(names)}")
    member = torch.tensor([[float(name == own) for name in names] for own in clusters], dtype=torch.float64)
    same, base = member @ member.T, (base - base.mean(0)).double()
    update = update.double()
    policy, compared = base + update, 1 - same
    of_prompt, total, counts = same @ update, update.sum(0), same.sum(1)
    n_others = len(clusters) - counts[:, None] - counts
    across = torch.zeros_like(same)
    for n in n_others[same == 0].unique():  # x_i + s − y_j with s = (total − of_prompt_i − of_prompt_j) / n
        found = torch.cdist(base + (total - of_prompt) / n, policy + of_prompt / n)
        across = torch.where(n_others == n, found, across)
    moved = across + across.T - torch.cdist(base, base) - torch.cdist(policy, policy)
    return energy_kernel(base, policy) * compared, moved * compared, compared
