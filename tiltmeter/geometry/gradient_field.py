"""Do the gradients of the preference loss around a hidden state point one way? A field of arrows on a grid (the paper's Fig. 1b).

One pair of tokens w, l that the same state h predicts; L = −log σ(β m), m = log-odds of w over l, less the base model's. The
grid is n³ around h, on v̂ and the two directions orthogonal to v along which states vary most.

At ``final_post_norm`` with v = e_w − e_l fixed, ∇_h L = −β σ(−β m) v is parallel to v whatever h is: R = 1 and the smallest
cosine 1 are a tautology, no finding. What can come out differently: before the norm, at a layer, along a sequence
(:func:`tiltmeter.geometry.gradients.sequence_gradients`), across pairs; :func:`field_summary` takes the gradients of any of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from tiltmeter.geometry.directions import principal_directions
from tiltmeter.geometry.gradients import GradientMoments, shared_state_gradient
from tiltmeter.geometry.rows import unit_rows
from tiltmeter.models.branch_attention import BranchCache, run_branches, use_branch_attention
from tiltmeter.models.cpu_linear import linear
from tiltmeter.models.hooks import hook_site
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM, backbone, final_norm, unembedding
from tiltmeter.pairs.log_probs import scale_and_cap

Variant = Literal["post_norm", "layer"]
Margin = Callable[[Float[Tensor, "point d_model"]], Float[Tensor, " point"]]
"""A differentiable function from states at a site to m in nats, each row on its own."""

_EXACT_UP_TO = 4096
_STARTS = 256
_POINTS_AT_A_TIME = 256


class FieldGrid(NamedTuple):
    """Grid of points at which the gradient is taken."""

    points: Float[Tensor, "point d_model"]
    coordinates: Float[Tensor, "point 3"]
    """Offset of each point from h, in standard deviations of the states along each axis; the last axis changes fastest."""
    axes: Float[Tensor, "3 d_model"]
    """Orthonormal axes: v̂, and the two principal directions of what is orthogonal to v."""
    spreads: Float[Tensor, " 3"]
    """Standard deviation σ of the states along each axis, in activation units."""


class FieldSummary(NamedTuple):
    """Agreement of the arrows of a field."""

    n_points: int
    """Number of points that have a gradient; one of zero, or below 1e-292, where digits are lost, has no direction."""
    mean_resultant: float
    """R = ‖mean ĝ‖, ĝ = g/‖g‖; NaN without any."""
    smallest_cosine: float
    """Smallest cosine of any two arrows; NaN with fewer than two."""
    is_exact: bool
    """Whether that cosine is exact; found from extreme points, it may be lower still (:func:`smallest_pairwise_cosine`)."""


class GradientField(NamedTuple):
    """Gradients on a grid, and what they have in common."""

    variant: Variant
    gradients: Float[Tensor, "point d_model"]
    """∇L at each point, float64."""
    summary: FieldSummary
    is_tautology: bool
    """Whether R = 1 follows from the formula alone and says nothing about a model."""


def field_grid(
    h: Float[Tensor, " d_model"],
    v: Float[Tensor, " d_model"],
    states: Float[Tensor, "row d_model"],
    *,
    n: int = 5,
    step: float = 0.5,
) -> FieldGrid:
    """n³ points around h, ``step`` standard deviations apart along each axis, in float64; the middle one is h when n is odd.

    Args:
        states: hidden states of the same site and position; they give the axes beside v and all spreads.
        n: points along an axis.
        step: distance of neighbours, in σ of the axis.

    Raises:
        ValueError: v is zero, or the states do not vary in two directions orthogonal to v.
    """
    exact, direction = states.to(torch.float64), v.to(torch.float64)
    if n < 1 or not step > 0 or not float(direction.norm()) > 0 or min(exact.shape) < 3:
        raise ValueError(
            f"field_grid: expected n ≥ 1, a step and a v above 0 and at least 3 states of width 3, got n={n}, "
            f"step={step}, |v|={float(direction.norm()):g} and states of shape {tuple(exact.shape)}"
        )
    along = direction / direction.norm()
    centred = exact - exact.mean(0)
    across = centred - torch.outer(centred @ along, along)
    found = principal_directions(across, 2, centred=False)
    if not found.energy_shares[1].sqrt() * across.norm() > 1e-10 * centred.norm():  # rounding isn't orthogonal to v
        raise ValueError("field_grid: the states do not vary in two directions orthogonal to v")
    axes = torch.cat([along[None], found.directions])
    spreads = (centred @ axes.T).square().sum(0).div(len(exact) - 1).sqrt()
    ticks = (torch.arange(n, dtype=torch.float64, device=exact.device) - (n - 1) / 2) * step
    coordinates = torch.cartesian_prod(ticks, ticks, ticks)
    return FieldGrid(h.to(torch.float64) + (coordinates * spreads) @ axes, coordinates, axes, spreads)


def post_norm_field(
    points: Float[Tensor, "point d_model"], v: Float[Tensor, " d_model"], *, reference_gap: float, beta: float
) -> GradientField:
    """The field at ``final_post_norm`` of a plain unembedding: −β σ(−β m) v, m = ⟨h, v⟩ − Δ_ref. R = 1 is asserted: a tautology.

    Args:
        v: e_w − e_l.
        reference_gap: Δ_ref = log π₀(w) − log π₀(l) in nats; with a bias in the unembedding, less its difference.
    """
    exact, direction = points.to(torch.float64), v.to(torch.float64)
    margins = exact @ direction - reference_gap
    gradients = shared_state_gradient(margins, direction.expand(len(exact), -1), beta=beta)
    summary = field_summary(gradients)
    assert not abs(summary.mean_resultant - 1) > 1e-9, "parallel to v by the formula"  # NaN: states that are not finite
    return GradientField("post_norm", gradients, summary, True)


def layer_field(
    points: Float[Tensor, "point d_model"],
    margin: Margin,
    *,
    beta: float,
) -> GradientField:
    """The field at any site, by automatic differentiation of −log σ(β m) through everything above it.

    Args:
        margin: runs what lies above the site with the state replaced at the place that predicts both tokens
            (:meth:`Context.margin`); its dtype is its own.
    """
    found = []
    for part in points.to(torch.float64).split(_POINTS_AT_A_TIME):
        h = part.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = -torch.nn.functional.logsigmoid(beta * margin(h)).sum()
            found.append(torch.autograd.grad(loss, h)[0])
    gradients = torch.cat(found)
    return GradientField("layer", gradients, field_summary(gradients), False)


class Context:
    """The words before two tokens, read once, so that m can be asked for at many states in the place that predicts the two.

    States at a layer are branches of one row (:mod:`tiltmeter.models.branch_attention`): each costs one token, whatever came
    before.

    Args:
        model: in evaluation mode.
        ids: tokens of the context; the state at the last one is what is replaced.

    Raises:
        ValueError: fewer than two tokens.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, ids: Sequence[int]) -> None:
        if len(ids) < 2:
            raise ValueError(f"Context: expected at least two tokens, got {len(ids)}")
        before = torch.tensor([ids[:-1]], device=model.device)
        self.model = model
        self._last, self._n_before = ids[-1], torch.tensor([len(ids) - 1], device=model.device)
        self._read = DynamicCache()  # without the model's configuration, so that sliding windows keep all tokens
        mask = torch.ones_like(before)
        backbone(model)(input_ids=before, attention_mask=mask, past_key_values=self._read, use_cache=True)

    def margin(self, site: str, *, chosen_id: int, rejected_id: int, reference_gap: float) -> Margin:
        """m = log π(w) − log π(l) − Δ_ref as a function of the state at a site.

        Raises:
            UserError: from inside the function: an unknown site, or a family whose attention can't be changed.
        """
        whole = unembedding(self.model)
        two = torch.tensor([chosen_id, rejected_id], device=whole.weight.device)
        head = replace(whole, weight=whole.weight[two], bias=None if whole.bias is None else whole.bias[two])

        def margin(states: Tensor) -> Tensor:
            final = self._final_states(site, states.to(self.model.device, self.model.dtype))
            logits = scale_and_cap(linear(final, head.weight, head.bias), head)
            return logits[:, 0] - logits[:, 1] - reference_gap

        return margin

    def _final_states(self, site: str, states: Float[Tensor, "point d_model"]) -> Float[Tensor, "point d_model"]:
        """States after the final norm that those at the site lead to."""
        if site == FINAL_POST_NORM:
            return states
        if site == FINAL_PRE_NORM:
            found: Tensor = final_norm(self.model)(states)
            return found
        cache = BranchCache(self._read, self._n_before, len(states), n_steps=1)
        tokens = torch.full((1, len(states)), self._last, device=self.model.device)
        with use_branch_attention(self.model):
            handle = hook_site(self.model, site, lambda hidden: states[None].to(hidden.dtype))
            try:
                return run_branches(self.model, tokens, cache)[0]
            finally:
                handle.remove()


@torch.no_grad()
def field_summary(gradients: Float[Tensor, "point d_model"]) -> FieldSummary:
    """R and the smallest pairwise cosine of any gradients.

    >>> field_summary(torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]))
    FieldSummary(n_points=2, mean_resultant=0.7071067811865476, smallest_cosine=0.0, is_exact=True)
    """
    moments = GradientMoments(gradients.shape[1], names=[], device=gradients.device)
    moments.update(_same_size(gradients), {})
    n_points, resultant, _ = moments.summary()
    return FieldSummary(n_points, resultant, *smallest_pairwise_cosine(gradients))


@torch.no_grad()
def smallest_pairwise_cosine(
    rows: Float[Tensor, "row d_model"], *, exact_up_to: int = _EXACT_UP_TO
) -> tuple[float, bool]:
    """Smallest cosine between two of the rows, and whether it is exact. Rows of zeros are left out; NaN for fewer than two.

    Up to ``exact_up_to`` rows all pairs are compared. Beyond, from the row least like the mean and from rows at even
    distances, each is replaced by the row farthest from it, an extreme point, until no pair gets worse: an upper bound of
    the smallest cosine at the cost of a few hundred rows against all.
    """
    scaled = _same_size(rows)
    unit = unit_rows(scaled[scaled.norm(dim=1) != 0])
    if len(unit) < 2:
        return math.nan, True
    if len(unit) <= exact_up_to:
        lowest = torch.stack([(part @ unit.T).min() for part in unit.split(_POINTS_AT_A_TIME)]).min()
        return float(lowest.clamp(-1, 1)), True
    if unit.isnan().any():
        return math.nan, False
    least_like = (unit @ unit.mean(0)).argmin()[None]
    reached = torch.cat([least_like, torch.arange(0, len(unit), -(-len(unit) // _STARTS), device=unit.device)])
    lowest = torch.full_like(unit[reached, 0], math.inf)
    while True:
        cosines, farthest = (unit[reached] @ unit.T).min(1)
        if not (cosines < lowest).any():
            return float(lowest.min().clamp(-1, 1)), False
        lowest, reached = cosines, farthest


def _same_size(rows: Tensor) -> Tensor:
    """Rows over their largest entry, in float64: squares of a saturated loss's gradients would underflow."""
    exact = rows.to(torch.float64)
    largest = exact.abs().amax(1, keepdim=True)
    limits = torch.finfo(torch.float64)
    there = largest > limits.tiny / limits.eps
    return exact / largest.where(there, 1.0) * there
