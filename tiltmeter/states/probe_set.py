"""A fixed set of held-out pairs whose hidden states are read again and again: one forward pass per observation.

Plain PyTorch: usable in any training loop. The base model is read once, before the first step; every later reading is
compared with it, row by row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from tiltmeter.errors import UserError
from tiltmeter.geometry.directions import mean_unembedding, token_preference_vectors
from tiltmeter.models.layers import Unembedding
from tiltmeter.pairs.batch import Layout, PreferenceBatch, TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import run_backbone
from tiltmeter.states.capture import HiddenStates, ReadPoint, capture, join_hidden_states
from tiltmeter.states.positions import Position, check_position, content_tokens, divergence, readings
from tiltmeter.states.state_pair import StatePair

_BEFORE_THE_RESPONSES_PART = {"prompt_last", "content", "diverge"}
ONE_PER_SIDE: tuple[Position, ...] = ("prompt_last", "content", "diverge", "response_last", "response_mean")
"""Positions that a probe reads."""
DEFAULT_POSITIONS: tuple[Position, ...] = ("prompt_last", "content", "diverge")
"""Positions that are read where nothing else is asked for."""

Forward = Callable[[PreferenceBatch], object]
"""Runs the model on a batch; what it returns is not looked at."""


class Probe:
    """Reads the hidden states of the same pairs at the same sites and positions.

    Args:
        batches: the pairs, laid out; those of weight 0 are computed and not read.
        sites: ``all``, a site or several (:mod:`tiltmeter.models.layers`).
        positions: see :mod:`tiltmeter.states.positions`; at most one row a response.
        prompts: token ids of the prompts of the whole data set, by ``pair_index``; ``content`` needs them.

    Raises:
        UserError: no pairs, an unknown position, or ``content`` without prompts.
    """

    def __init__(
        self,
        batches: Sequence[PreferenceBatch],
        *,
        sites: str | Sequence[str] = "all",
        positions: Sequence[Position] = DEFAULT_POSITIONS,
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if not batches:
            raise UserError("probe: expected at least one held-out pair to read, got none; set datamodule.probe_pairs")
        for position in positions:
            if check_position(position) not in ONE_PER_SIDE:
                raise UserError(f"positions: a probe reads {', '.join(ONE_PER_SIDE)}, got {position}")
        self.batches = list(batches)
        self.sites = sites
        self.positions = tuple(positions)
        content = None if prompts is None else content_tokens(prompts)
        self._wanted = [{p: readings(batch, p, content=content) for p in positions} for batch in self.batches]

    @classmethod
    def of_pairs(
        cls,
        pairs: Sequence[TokenizedPair],
        *,
        pairs_per_batch: int = 16,
        layout: Layout = "shared_prefix",
        sites: str | Sequence[str] = "all",
        positions: Sequence[Position] = DEFAULT_POSITIONS,
    ) -> "Probe":
        """A probe for any training loop: pairs sorted by length, cut to what is read, in padded rows.

        Args:
            layout: ``concatenated`` for models that can't share a prompt (:func:`tiltmeter.pairs.verification.best_layout`).
        """
        cut = [cut_pair(pair, positions) for pair in pairs]
        order = sorted(range(len(cut)), key=lambda row: sum(map(len, cut[row])))
        groups = [order[at : at + pairs_per_batch] for at in range(0, len(order), pairs_per_batch)]
        batches = [collate_pairs([cut[row] for row in rows], pair_index=rows, layout=layout) for rows in groups]
        return cls(batches, sites=sites, positions=positions, prompts=[pair.prompt_ids for pair in pairs])

    @torch.no_grad()
    def read(self, model: PreTrainedModel, forward: Forward | None = None) -> dict[ReadPoint, HiddenStates]:
        """Hidden states in float32 at every site and position, ordered by pair; one forward pass per batch.

        Args:
            model: what the hooks are put on; its training mode is left as it is.
            forward: how the model is run; None: its backbone alone.

        Raises:
            UserError: an unknown site, or a model without recognisable blocks.
        """
        parts = []
        for batch, wanted in zip(self.batches, self._wanted, strict=True):
            on_device = batch.to(model.device)
            with capture(model, self.sites, wanted, dtype=torch.float32) as captured:
                if forward is None:
                    run_backbone(model, on_device)
                else:
                    forward(on_device)
            parts.append(
                {
                    point: HiddenStates(rows.cpu(), wanted[point.position].pair_index, wanted[point.position].sides)
                    for point, rows in captured.items()
                }
            )
        return join_hidden_states(parts)

    def read_pair(self, base: PreTrainedModel, policy: PreTrainedModel, **known: Any) -> StatePair:
        """Both models' hidden states of the same tokens; ``known``: what else :class:`StatePair` takes."""
        return StatePair(self.read(base), self.read(policy), **known)


class PreferenceDirections:
    """Directions that the preference asks for: v at the first differing tokens and v̄ over whole responses, for each pair.

    Args:
        head: the base model's unembedding.
        pairs: the probe's pairs, whole, by ``pair_index``.
    """

    def __init__(self, head: Unembedding, pairs: Sequence[TokenizedPair]) -> None:
        device = head.weight.device
        whole = collate_pairs(pairs, pair_index=range(len(pairs)), layout="concatenated")
        parted = divergence(whole)
        self.diverging = parted.pairs
        """[diverging] pairs that have a v."""
        self.chosen_ids, self.rejected_ids = parted.chosen_ids, parted.rejected_ids
        self.token = token_preference_vectors(head, self.chosen_ids.to(device), self.rejected_ids.to(device)).cpu()
        """[diverging, d_model] v = e_w − e_l."""
        means = mean_unembedding(
            head, whole.target_ids.to(device), whole.target_sequences.to(device), whole.n_sequences
        ).cpu()
        self.sequence = means[: len(pairs)] - means[len(pairs) :]
        """[pair, d_model] v̄."""


def cut_pair(pair: TokenizedPair, positions: Sequence[Position]) -> TokenizedPair:
    """Leave out response tokens that no position reads and that come after all that are.

    >>> cut_pair(TokenizedPair([1, 2], [3, 4, 5, 6], [3, 7, 8]), ["diverge"])
    TokenizedPair(prompt_ids=[1, 2], chosen_ids=[3, 4], rejected_ids=[3, 7])
    """
    if not set(positions) <= _BEFORE_THE_RESPONSES_PART:
        return pair
    prompt, chosen, rejected = pair
    n = 1
    if "diverge" in positions:
        shorter = min(len(chosen), len(rejected))
        n = next((at + 1 for at in range(shorter) if chosen[at] != rejected[at]), shorter)
    return TokenizedPair(prompt, chosen[:n], rejected[:n])
