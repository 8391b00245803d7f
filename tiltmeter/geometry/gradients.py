"""The gradient of a preference loss with respect to hidden states: closed forms, pull-back through norms, streaming geometry.

L = −log σ(β m), m the difference of log-ratios of chosen and rejected, e_t row t of the unembedding, v = e_w − e_l.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltmeter.models.layers import Unembedding
from tiltmeter.pairs.batch import PreferenceBatch
from tiltmeter.pairs.log_probs import default_chunk_tokens


def shared_state_gradient(
    margins: Float[Tensor, " pair"], v: Float[Tensor, "pair d_model"], *, beta: float
) -> Float[Tensor, "pair d_model"]:
    """∇_h L = −β σ(−β m) v: one state h that predicts both answers of one token each, of a plain linear unembedding.

    The log-normaliser is the same for both tokens and cancels, so this is parallel to v whatever h is.

    Args:
        margins: m in nats.
    """
    return -(beta * torch.sigmoid(-beta * margins))[:, None] * v


def sequence_gradients(
    margins: Float[Tensor, " pair"],
    log_prob_gradients: Float[Tensor, "target d_model"],
    target_sequences: Int[Tensor, " target"],
    *,
    beta: float,
) -> Float[Tensor, "target d_model"]:
    """∂L/∂h_t = ∓β σ(−β m) (e_t − E_{p_t}[e]): minus at chosen tokens, plus at rejected ones.

    At the row that predicts both first tokens the two add up, the expectations cancel and v is left.

    Args:
        margins: m in nats; pair i has sequences i (chosen) and n_pairs + i (rejected).
        log_prob_gradients: of each target (:func:`log_prob_gradients`).
    """
    n_pairs = len(margins)
    signs = torch.where(target_sequences < n_pairs, -1.0, 1.0).to(margins.dtype)
    factors = signs * (beta * torch.sigmoid(-beta * margins))[target_sequences % n_pairs]
    return factors[:, None] * log_prob_gradients


@torch.no_grad()
def log_prob_gradients(
    hidden: Float[Tensor, "target d_model"],
    head: Unembedding,
    target_ids: Int[Tensor, " target"],
    *,
    chunk_tokens: int | None = None,
) -> Float[Tensor, "target d_model"]:
    """∂ log p(t) / ∂h = e_t − Σ_j p_j e_j, times the head's scale and the slope of its cap; a chunk of logits at a time.

    Args:
        hidden: ``final_post_norm`` states.
    """
    weight, found = head.weight, []
    chunk_tokens = default_chunk_tokens(len(weight)) if chunk_tokens is None else chunk_tokens
    for h, ids in zip(hidden.split(chunk_tokens), target_ids.split(chunk_tokens), strict=True):
        logits = head.scale * torch.nn.functional.linear(h, weight, head.bias)
        slope = torch.full_like(logits, head.scale)
        if head.soft_cap is not None:
            squashed = torch.tanh(logits / head.soft_cap)
            logits, slope = squashed * head.soft_cap, slope * (1 - squashed.square())
        by_logit = -logits.softmax(-1)
        by_logit.scatter_add_(1, ids[:, None], torch.ones_like(by_logit[:, :1]))
        found.append((by_logit * slope) @ weight)
    return torch.cat(found)


class GradientSummary(NamedTuple):
    """Geometry of all gradients seen."""

    n_rows: int
    """Rows with a gradient; rows of zeros have no direction and count nowhere."""
    mean_resultant: float
    """R = ‖mean ĝ‖, ĝ = g/‖g‖: 1 if all point one way, about 1/√N for noise. With one shared v at ``final_post_norm`` it is
    1 by construction."""
    energy_shares: dict[str, float]
    """Σ ⟨g, k̂⟩² / Σ ‖g‖² along each direction k."""


def rows_that_predict(batch: PreferenceBatch) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    """Flattened rows of a batch whose hidden state predicts a target, each once, and the pair that each belongs to.

    Only they get a gradient at ``final_post_norm``; pairs of weight 0 are left out.

    >>> from tiltmeter.pairs.batch import TokenizedPair, collate_pairs
    >>> [x.tolist() for x in rows_that_predict(collate_pairs([TokenizedPair([1, 5], [6, 2], [7])], pair_index=[9]))]
    [[1, 2], [0, 0]]
    """
    rows, places = torch.unique(batch.target_rows, return_inverse=True)
    pairs = torch.empty_like(rows).scatter_(0, places, batch.target_sequences % batch.n_pairs)
    real = batch.weights[pairs] > 0
    return rows[real], pairs[real]


class GradientMoments:
    """Accumulates gradients of rows in O(d) memory, in float64, in any order and any cut.

    Args:
        d_model: width of the rows.
        names: the directions along which energy is measured.
        device: where sums live; gradients are reduced on their own device first.

    >>> moments = GradientMoments(2, names=["x"])
    >>> moments.update(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), {"x": torch.tensor([[1.0, 0.0]])})
    >>> moments.summary().energy_shares
    {'x': 0.36}
    """

    def __init__(self, d_model: int, *, names: list[str], device: torch.device | str = "cpu") -> None:
        self.names = list(names)
        self._sums = torch.zeros(d_model + 2 + len(names), dtype=torch.float64, device=device)
        """Σ ĝ, then the number of rows, Σ ‖g‖² and Σ ⟨g, k̂⟩² for each name."""

    @torch.no_grad()
    def update(
        self, gradients: Float[Tensor, "row d_model"], directions: Mapping[str, Float[Tensor, "#row d_model"]]
    ) -> None:
        """Add gradients of further rows.

        Args:
            directions: for every name one vector a row, or one [1, d_model] for all; of any length, zero: no energy along it.

        Raises:
            ValueError: other names than those announced.
        """
        if set(directions) != set(self.names):
            raise ValueError(f"GradientMoments: expected directions {self.names}, got {list(directions)}")
        g = gradients.to(torch.float64)
        squares = g.square().sum(1)
        unit = g / squares.where(squares > 0, 1.0).sqrt()[:, None]
        along = [(g * _unit(directions[name])).sum(1).square().sum() for name in self.names]
        parts = [
            unit.sum(0),
            (squares > 0).sum(0, keepdim=True),
            squares.sum(0, keepdim=True),
            *(x[None] for x in along),
        ]
        self._sums += torch.cat([x.to(self._sums) for x in parts])

    def merge(self, other: "GradientMoments") -> None:
        """Add all rows that another accumulator of the same directions has seen."""
        if self.names != other.names:
            raise ValueError(f"GradientMoments: expected directions {self.names}, got {other.names}")
        self._sums += other._sums.to(self._sums)

    def all_reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> "GradientMoments":
        """The accumulator of all processes' rows, the same on each; a collective of one sum."""
        merged = GradientMoments(len(self._sums) - 2 - len(self.names), names=self.names, device=self._sums.device)
        merged._sums = sum_over_ranks(self._sums.clone())
        return merged

    def reset(self) -> None:
        """Forget all rows."""
        self._sums.zero_()

    def summary(self) -> GradientSummary:
        """Geometry of what was seen; NaN when no row had a gradient, or one was not finite."""
        d = len(self._sums) - 2 - len(self.names)
        n, energy, *along = self._sums[d:]
        return GradientSummary(
            int(n.nan_to_num()),
            float(self._sums[:d].norm() / n),
            {name: float(share / energy) for name, share in zip(self.names, along, strict=True)},
        )


def _unit(direction: Tensor) -> Tensor:
    exact = direction.to(torch.float64)
    norms = exact.norm(dim=-1, keepdim=True)
    return exact / norms.where(norms > 0, 1.0)
