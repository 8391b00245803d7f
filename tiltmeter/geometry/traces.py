"""Traces of training in states of text that has nothing to do with it: a constant part of δ, and the tokens that it points to.

Narrow fine-tuning leaves one in the first tokens of any text (Minder et al., "Narrow Finetuning Leaves Clearly Readable Traces in
Activation Differences", arXiv 2510.13900). Does a preference?
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tiltmeter.geometry.consistency import shift_shares_of_gram
from tiltmeter.geometry.rows import in_own_span
from tiltmeter.models.layers import Unembedding
from tiltmeter.stats.jackknife import NO_INTERVAL, SHARE, Interval, jackknife_interval


class LensTokens(NamedTuple):
    """Tokens that a direction makes more and less likely through the unembedding, the strongest first."""

    up: Int[Tensor, " n"]
    down: Int[Tensor, " n"]
    logits: Float[Tensor, " vocab"]
    """Logit of every token; no unit where the direction was normed."""


@torch.no_grad()
def logit_lens(
    direction: Float[Tensor, " d_model"], head: Unembedding, *, norm: nn.Module | None, n_tokens: int = 10
) -> LensTokens:
    """Logits W_U · norm(δ) of a difference of states, without bias and soft cap, and the tokens at both ends.

    Args:
        direction: a difference of hidden states.
        norm: the final norm, for states in front of it (the logit lens); None: behind it, where logits are linear.
        n_tokens: at either end.

    >>> found = logit_lens(torch.tensor([1.0, -2.0]), Unembedding(torch.eye(2)), norm=None, n_tokens=1)
    >>> found.up.tolist(), found.down.tolist()
    ([0], [1])
    """
    weight = head.weight
    moved = direction.to(weight) if norm is None else norm(direction.to(weight)[None])[0]
    logits = head.scale * (weight @ moved).double()
    return LensTokens(logits.topk(n_tokens).indices, (-logits).topk(n_tokens).indices, logits)


def constant_share(updates: Float[Tensor, "row d_model"], groups: Sequence[str]) -> Interval:
    """Share of Σ ‖δ‖² that is one constant shift, ‖mean δ‖² / mean ‖δ‖², 0 … 1, with its 95 % interval over texts.

    Args:
        updates: δ of tokens of texts.
        groups: the text of each row.

    Returns:
        NaN where the models are the same.

    Raises:
        ValueError: no rows.

    >>> constant_share(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), ["a", "b"]).value
    0.5
    """
    if len(updates) and not updates.any():
        return NO_INTERVAL
    rows = in_own_span(updates)
    return jackknife_interval(shift_shares_of_gram(rows @ rows.T), groups, second_order=True, scale=SHARE)


def difference_directions(
    states: Float[Tensor, "row d_model"], groups: Sequence[str], n: int, *, seed: int
) -> Float[Tensor, "n d_model"]:
    """Differences of two states of different texts, drawn at random: directions that states vary along anyway, float64.

    Args:
        states: rows of one model.
        groups: the text of each row; both ends of a difference are of different ones.
        n: how many.
        seed: of the draw.

    Raises:
        ValueError: one text alone, or states that are all the same.
    """
    if len(set(groups)) < 2 or not bool((states != states[0]).any()):
        raise ValueError("difference_directions: expected states of at least two texts that differ, got one")
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    while len(found) < n:
        i, j = torch.randint(len(states), (2,), generator=generator).tolist()
        difference = states[i].double() - states[j].double()
        if groups[i] != groups[j] and difference.any():
            found.append(difference)
    return torch.stack(found)
