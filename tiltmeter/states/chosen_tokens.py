"""Chosen responses token by token: where each token is predicted, and how far two models' predictions there are apart.

One table with a row a token holds whatever was read: final states kept of the base, or the divergence of a later model from it.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tiltmeter.models.cpu_linear import linear
from tiltmeter.models.layers import Unembedding, unembedding
from tiltmeter.pairs.batch import PreferenceBatch, TokenizedPair
from tiltmeter.pairs.log_probs import default_chunk_tokens, scale_and_cap, target_hidden_states
from tiltmeter.steering.recovery import kl_divergences


class ChosenTokens:
    """Numbers the tokens of the chosen responses of some pairs: pair by pair, each from its first token to its last.

    Args:
        lengths: tokens of each pair's chosen response, by ``pair_index``.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._starts = list(accumulate(self.lengths, initial=0))

    def __len__(self) -> int:
        """Tokens of all pairs together."""
        return self._starts[-1]

    def of_batch(self, batch: PreferenceBatch) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
        """Targets of a batch that are chosen tokens of real pairs, and the number of each, in any layout with whole responses.

        >>> from tiltmeter.pairs.batch import collate_pairs
        >>> batch = collate_pairs([TokenizedPair([1], [6, 2], [7, 8, 2])], pair_index=[1])
        >>> [found.tolist() for found in ChosenTokens([5, 2]).of_batch(batch)]
        [[0, 1], [5, 6]]
        """
        real = batch.weights.nonzero()[:, 0]  # chosen sequences are numbered as their pairs are
        targets = torch.isin(batch.target_sequences, real).nonzero()[:, 0]
        targets = targets[batch.target_sequences[targets].argsort(stable=True)]
        numbers = [n for i in batch.pair_index[real].tolist() for n in range(self._starts[i], self._starts[i + 1])]
        return targets, torch.tensor(numbers, dtype=torch.long, device=targets.device)

    def read(
        self,
        batch: PreferenceBatch,
        model: PreTrainedModel,
        *,
        base: Float[Tensor, "token d_model"] | None,
        base_head: Unembedding,
    ) -> tuple[Int[Tensor, " read"], Float[Tensor, "read _"]]:
        """Numbers of a batch's tokens with the final states that predict them or, given the base's, with KL(π ‖ π₀) in nats.

        Args:
            base: final states of the base at all tokens, on any device.
            base_head: its unembedding; the model's is its own.
        """
        targets, numbers = self.of_batch(batch)
        states = target_hidden_states(model, batch)[targets]
        if base is None:
            return numbers, states
        return numbers, token_divergences(states, unembedding(model), base[numbers.to(base.device)], base_head)[:, None]

    def by_response(self, values: Float[Tensor, " token"]) -> list[Float[Tensor, " _"]]:
        """Values of all tokens, cut by response."""
        return list(values.split(self.lengths))


def shorten_rejected(pair: TokenizedPair) -> TokenizedPair:
    """Leave one token of the rejected response, which every layout of pairs needs and nobody reads.

    >>> shorten_rejected(TokenizedPair([1], [6, 2], [7, 8, 2]))
    TokenizedPair(prompt_ids=[1], chosen_ids=[6, 2], rejected_ids=[7])
    """
    return pair._replace(rejected_ids=pair.rejected_ids[:1])


def token_divergences(
    policy: Float[Tensor, "token d_model"],
    policy_head: Unembedding,
    base: Float[Tensor, "token d_model"],
    base_head: Unembedding,
    *,
    chunk_tokens: int | None = None,
) -> Float[Tensor, " token"]:
    """KL(π ‖ π₀) in nats over the whole vocabulary, of the predictions that each model's final states and own unembedding give.

    Logits are in the dtype of each unembedding, whatever autocast says, and sums in float32 or better.

    Args:
        policy, base: states behind the final norm at the same places, the base's on any device.
        chunk_tokens: places whose logits exist at a time; None: :func:`~tiltmeter.pairs.log_probs.default_chunk_tokens`.
    """
    chunk = default_chunk_tokens(len(policy_head.weight)) if chunk_tokens is None else chunk_tokens
    parts = zip(policy.split(chunk), base.split(chunk), strict=True)
    with torch.autocast(policy.device.type, enabled=False):
        found = [kl_divergences(_logits(ours, policy_head), _logits(theirs, base_head)) for ours, theirs in parts]
    return torch.cat(found)


def _logits(hidden: Tensor, head: Unembedding) -> Tensor:
    return scale_and_cap(linear(hidden.to(head.weight), head.weight, head.bias), head)
