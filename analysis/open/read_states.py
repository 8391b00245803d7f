"""Hidden states of two checkpoints, read now: what a run would have kept of them, without its course."""

import math
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from analysis.contract import Cost
from analysis.open.checkpoints import Checkpoints
from analysis.open.observations import observed
from analysis.open.observed import Observed
from tiltmeter.errors import UserError
from tiltmeter.metric_names import STEPS_TAKEN
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.layers import Unembedding, unembedding
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.pairs.verification import best_layout
from tiltmeter.states.observed_metrics import observation_metrics
from tiltmeter.states.positions import Position
from tiltmeter.states.probe_set import DEFAULT_POSITIONS, PreferenceDirections, Probe, cut_pair
from tiltmeter.weights.random_update import FORMS, N_DRAWS, RandomUpdates, check_draws, read_random_updates

_POSITIONS = DEFAULT_POSITIONS
_HELD_AGAINST_RANDOM: tuple[Position, ...] = ("prompt_last", "content")
_LEAST_PAIRS = 4
AFTER = "aligned"
"""Name of the reading after training, where a run has that of a snapshot."""


class StateReading:
    """Options of reading hidden states that no run stored: at every site, where prompts end and where responses part.

    Also at a content token of each prompt; and, there and where prompts end, under random weight changes as large as that from
    base to aligned.

    Args:
        n_pairs: the first so many pairs; their rows are all kept in memory, since figures are drawn pair by pair.
        pairs_per_batch: pairs in one forward pass.
        n_random_updates: random weight changes of each form (:mod:`tiltmeter.weights.random_update`).
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        n_pairs: int = 512,
        pairs_per_batch: int = 16,
        n_random_updates: int = N_DRAWS,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        if n_pairs < _LEAST_PAIRS or pairs_per_batch < 1:
            raise UserError(
                f"hidden_states: expected n_pairs of at least {_LEAST_PAIRS} and pairs_per_batch of at least 1, got {n_pairs} and "
                f"{pairs_per_batch}"
            )
        if dtype not in DTYPES:
            raise UserError(f"hidden_states.dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
        try:
            check_draws(n_random_updates, FORMS)
        except UserError as error:
            raise UserError(f"hidden_states.n_random_updates: {error}") from error
        self.n_pairs, self.pairs_per_batch, self.n_random_updates = n_pairs, pairs_per_batch, n_random_updates
        self.dtype, self.device = dtype, device

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """One pass through each model, of pairs cut behind the last token that is read, and those of random weights."""
        n_tokens = self._tokens(checkpoints, _POSITIONS)
        return [Cost("hidden states", 2.0, 2 * n_tokens), *self.random_costs(checkpoints)]

    def random_costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """A pass for each random weight change, and one for the base."""
        n_passes = 1 + len(FORMS) * self.n_random_updates
        n_tokens = self._tokens(checkpoints, _HELD_AGAINST_RANDOM)
        return [Cost("random weights", float(n_passes), n_passes * n_tokens)]

    def _tokens(self, checkpoints: Checkpoints, positions: Sequence[Position]) -> int:
        cut = [cut_pair(pair.ids, positions) for pair in checkpoints.pairs[: self.n_pairs]]
        return sum(len(part) for pair in cut for part in pair)

    def random_updates(self, checkpoints: Checkpoints, *, n_steps: int | None = None) -> RandomUpdates:
        """Read the base under random weight changes as large as that to the aligned model.

        Args:
            n_steps: optimizer steps between the two, where they are known.

        Raises:
            UserError: weights that are not finite.
        """
        pairs = [pair.ids for pair in checkpoints.pairs[: self.n_pairs]]
        return self._random_updates(checkpoints, pairs, n_steps)

    def _random_updates(
        self, checkpoints: Checkpoints, pairs: Sequence[TokenizedPair], n_steps: int | None
    ) -> RandomUpdates:
        probe = self._probe(checkpoints, pairs, _HELD_AGAINST_RANDOM)
        policy = checkpoints.aligned.model.state_dict()
        try:
            return read_random_updates(
                checkpoints.base.model, policy, pairs, probe, n_draws=self.n_random_updates, steps_taken=n_steps
            )
        except ValueError as error:
            raise UserError(f"hidden_states: {error}") from error

    def _probe(self, checkpoints: Checkpoints, pairs: Sequence[TokenizedPair], positions: Sequence[Position]) -> Probe:
        layout = best_layout(checkpoints.base.model, pairs)
        return Probe.of_pairs(pairs, pairs_per_batch=self.pairs_per_batch, layout=layout, positions=positions)

    def read(self, checkpoints: Checkpoints, *, n_steps: int | None = None) -> Observed:
        """Read both models.

        Args:
            n_steps: optimizer steps between the two, where they are known.

        Raises:
            UserError: fewer than four pairs with finite states.
        """
        pairs = list(checkpoints.pairs[: self.n_pairs])
        ids = [pair.ids for pair in pairs]
        probe = self._probe(checkpoints, ids, _POSITIONS)
        states = probe.read_pair(
            checkpoints.base.model,
            checkpoints.aligned.model,
            pair_ids=[pair.pair_id for pair in pairs],
            clusters=[pair.group for pair in pairs],
            tokens=ids,
            name=AFTER,
            steps_taken=n_steps,
            dtype=self.dtype,
        ).finite()
        if (n_finite := len(states.tokens)) < _LEAST_PAIRS:
            raise UserError(
                f"hidden_states: expected finite states of at least {_LEAST_PAIRS} pairs, got {n_finite} of {len(pairs)}; "
                "ask about more pairs (pairs.n_pairs), or in another dtype"
            )
        head = unembedding(checkpoints.base.model)
        random = None
        if states.has_changed():
            with suppress(UserError):  # weights that are not finite: pairs whose states are may still be looked at
                random = self._random_updates(checkpoints, states.tokens, n_steps)
        figures = observation_metrics(states, PreferenceDirections(head, states.tokens), head=head)
        metrics = pd.DataFrame([{STEPS_TAKEN: n_steps or 0, **figures}])
        table = observed(metrics).assign(steps_taken=math.nan if n_steps is None else n_steps)
        return Observed(metrics, table, lambda: states, lambda: random, partial(_rows_of, head))


def _rows_of(head: Unembedding, ids: Sequence[int], _: int) -> tuple[Tensor, str]:
    rows = head.weight.detach()[list(ids)].cpu()
    return rows.to(torch.promote_types(rows.dtype, torch.float32)), "base"
