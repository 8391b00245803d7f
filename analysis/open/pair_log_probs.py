"""Log-probs of pairs under models that are open, and their divergence, token by token: two plain rows a pair."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor

from analysis.open.models import LoadedModel
from tiltmeter.models.cpu_linear import fast_linear, linear
from tiltmeter.models.layers import Unembedding, unembedding
from tiltmeter.pairs.batch import PreferenceBatch, TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import default_chunk_tokens, scale_and_cap, target_hidden_states, token_log_probs
from tiltmeter.pairs.preference_losses import PairLogProbs, PreferenceLoss
from tiltmeter.steering.recovery import kl_divergences

_TOKENS_PER_BATCH = 8192
_MANY_BATCHES = 40
"""From so many on, the time left is shown."""


class SideLogProbs(NamedTuple):
    """log π of each token of both responses, nats."""

    chosen: Float[Tensor, " token"]
    rejected: Float[Tensor, " token"]


class Compared(NamedTuple):
    """Log-probs and divergences of two models on one response, at each of its tokens, in nats, float64 on the CPU."""

    base: Float[Tensor, " token"]
    """log π₀."""
    aligned: Float[Tensor, " token"]
    """log π."""
    kl: Float[Tensor, " token"]
    """KL(π ‖ π₀), over the whole vocabulary."""
    kl_moved: Float[Tensor, " token"]
    """KL(π ‖ the base whose states behind the final norm are moved)."""


class ComparedPair(NamedTuple):
    """Both responses of one pair, compared."""

    chosen: Compared
    rejected: Compared


@torch.no_grad()
def compare_on_pairs(
    base: LoadedModel, aligned: LoadedModel, pairs: Sequence[TokenizedPair], *, move: Float[Tensor, " d_model"]
) -> list[ComparedPair]:
    """Both models on every token of both responses of every pair, by one pass of each.

    Args:
        move: added to the base's states behind the final norm, from which every token is predicted.
    """
    found: dict[int, ComparedPair] = {}
    with fast_linear(base.model), fast_linear(aligned.model):
        for rows in batches_by_length([longer_row(pair) for pair in pairs]):
            batch = collate_pairs([pairs[row] for row in rows], pair_index=rows, layout="concatenated")
            batch = batch.to(base.model.device)
            said = _compared(base, aligned, batch, move.to(base.model.device)).double().cpu()
            sides = _by_response(said, batch, [pairs[row] for row in rows])
            responses = [Compared(*side.unbind(1)) for side in sides]
            found |= {row: ComparedPair(responses[i], responses[len(rows) + i]) for i, row in enumerate(rows)}
    return [found[row] for row in range(len(pairs))]


def _compared(
    base: LoadedModel, aligned: LoadedModel, batch: PreferenceBatch, move: Tensor
) -> Float[Tensor, "target figure"]:
    """The figures of :class:`Compared` of every target of a batch, a chunk of logits at a time."""
    start, goal = (target_hidden_states(of.model, batch) for of in (base, aligned))
    heads = unembedding(base.model), unembedding(aligned.model)
    found = []
    for at in torch.arange(len(start), device=start.device).split(default_chunk_tokens(len(heads[0].weight))):
        logits = _logits(start[at], heads[0])
        aim = _logits(goal[at], heads[1])
        moved = _logits(start[at] + move.to(start.dtype), heads[0])
        said = [of.log_softmax(-1).gather(1, batch.target_ids[at, None])[:, 0] for of in (logits, aim)]
        found.append(torch.stack([*said, kl_divergences(aim, logits), kl_divergences(aim, moved)], dim=1))
    return torch.cat(found)


def _logits(hidden: Tensor, head: Unembedding) -> Tensor:
    return scale_and_cap(linear(hidden, head.weight, head.bias), head)


@torch.no_grad()
def tokens_of_pairs(opened: LoadedModel, pairs: Sequence[TokenizedPair]) -> list[SideLogProbs]:
    """log π(y_t | x, y_<t) of every token of both responses of every pair, nats, float64 on the CPU."""
    found: dict[int, SideLogProbs] = {}
    batches = list(batches_by_length([longer_row(pair) for pair in pairs]))
    quiet = len(batches) < _MANY_BATCHES
    for rows in track(batches, "Reading pairs", console=Console(highlight=False), disable=quiet, transient=True):
        batch = collate_pairs([pairs[row] for row in rows], pair_index=rows, layout="concatenated")
        batch = batch.to(opened.model.device)
        hidden = target_hidden_states(opened.model, batch)
        said = token_log_probs(hidden, unembedding(opened.model), batch.target_ids).double().cpu()
        sides = _by_response(said, batch, [pairs[row] for row in rows])
        found |= {row: SideLogProbs(sides[i], sides[len(rows) + i]) for i, row in enumerate(rows)}
    return [found[row] for row in range(len(pairs))]


def sums_of_pairs(said: Sequence[SideLogProbs]) -> Float[Tensor, "pair side"]:
    """log π of chosen and rejected, summed over tokens, nats.

    >>> sums_of_pairs([SideLogProbs(torch.tensor([-1.0, -2.0]), torch.tensor([-4.0]))]).tolist()
    [[-3.0, -4.0]]
    """
    return torch.tensor([[float(side.sum()) for side in pair] for pair in said], dtype=torch.float64).reshape(-1, 2)


def losses_of(
    loss: PreferenceLoss,
    sums: Float[Tensor, "model pair side"],
    reference: Float[Tensor, "pair side"],
    pairs: Sequence[TokenizedPair],
) -> Float[Tensor, "model pair"]:
    """Preference loss of every pair by several models, each with the same reference.

    Args:
        sums: log π of chosen and rejected by each, nats.
        reference: log π₀ of both.
    """
    counts = torch.tensor([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs])
    return torch.stack([loss(PairLogProbs(*of.unbind(1), *reference.unbind(1), *counts.unbind(1))) for of in sums])


def _by_response(said: Tensor, batch: PreferenceBatch, pairs: Sequence[TokenizedPair]) -> Sequence[Tensor]:
    """Rows of targets, cut by response: all chosen ones, then all rejected ones."""
    order = batch.target_sequences.cpu().argsort(stable=True)
    lengths = [*(len(pair.chosen_ids) for pair in pairs), *(len(pair.rejected_ids) for pair in pairs)]
    return torch.split(said[order], lengths)


def batches_by_length(
    lengths: Sequence[int], *, tokens: int = _TOKENS_PER_BATCH, rows_each: int = 2
) -> Iterator[list[int]]:
    """Numbers of pairs of similar length, the longest first, as many as fit, at least one.

    Args:
        lengths: tokens of the longer row of each pair.
        tokens: of all rows of a batch, padding counted.
        rows_each: rows of a pair.

    >>> list(batches_by_length([3, 1, 2, 9], tokens=12))
    [[3], [2, 0], [1]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        n = max(1, tokens // (rows_each * lengths[order[-1]]))
        order, rows = order[:-n], order[-n:]
        yield rows


def longer_row(pair: TokenizedPair) -> int:
    """Tokens of the prompt with the longer response."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
