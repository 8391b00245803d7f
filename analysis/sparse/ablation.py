"""The preference loss when some sparse features are no longer steered: all sets at once, the model below them read once."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analysis.open.models import LoadedModel
from analysis.open.pair_log_probs import batches_by_length, longer_row
from tiltmeter.pairs.batch import PreferenceBatch, TokenizedPair, collate_pairs
from tiltmeter.sparse.steering import SparseSteering, effective_steering
from tiltmeter.steering.sweep_logits import hidden_at, moved_logits

_SETS_AT_A_TIME = 32
_TOKENS_PER_BATCH = 4096


@torch.no_grad()
def sums_under(
    base: LoadedModel,
    steering: SparseSteering,
    pairs: Sequence[TokenizedPair],
    left: Sequence[Bool[Tensor, " width"]],
    *,
    say: Callable[[int, int], object] = lambda done, of: None,
) -> Float[Tensor, "set pair side"]:
    """log π of chosen and rejected responses when only some features are steered, nats.

    Args:
        base: the model without the steering, whose states at the site it changes.
        left: features that are still steered, of each set; all others are not.
        say: told how many sets of batches are done, and of how many.
    """
    found = torch.zeros(len(left), len(pairs), 2, dtype=torch.float64)
    batches = list(batches_by_length([longer_row(pair) for pair in pairs], tokens=_TOKENS_PER_BATCH))
    chunks = [range(at, min(at + _SETS_AT_A_TIME, len(left))) for at in range(0, len(left), _SETS_AT_A_TIME)]
    for i, rows in enumerate(batches):
        batch = collate_pairs([pairs[row] for row in rows], pair_index=rows, layout="concatenated")
        batch = batch.to(base.model.device)
        hidden = hidden_at(base.model, batch, steering.site)
        features = steering.sae.encode(hidden)
        s = steering.steering(hidden)
        for j, chunk in enumerate(chunks):
            moves = [
                steering.sae.move(effective_steering(features, s * left[k].to(s)), like=hidden).to(hidden.dtype)
                for k in chunk
            ]
            _add(found[chunk.start : chunk.stop], base, batch, rows, steering.site, moves)
            say(i * len(chunks) + j + 1, len(batches) * len(chunks))
    return found


def _add(
    found: Tensor, base: LoadedModel, batch: PreferenceBatch, rows: list[int], site: str, moves: Sequence[Tensor]
) -> None:
    """Add the log-probs of a batch's targets under each move to those of their responses."""
    of = torch.tensor(rows).repeat(2)[batch.target_sequences.cpu()]
    side = (batch.target_sequences >= batch.n_pairs).long().cpu()
    for part in moved_logits(base.model, batch, site=site, moves=moves):
        said = part.log_probs(batch)[1:].double().cpu()
        at = part.targets.cpu()
        found.flatten(1).index_add_(1, 2 * of[at] + side[at], said)
