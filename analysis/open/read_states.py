"""Hidden states of two checkpoints, read now: what a run's probe would have logged and stored of them, without its course."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from analysis.contract import Cost
from analysis.figures.fig1a_plane import Parting
from analysis.figures.hidden_states import Watched
from analysis.open.checkpoints import Checkpoints
from analysis.open.observations import DIVERGE, STEPS_TAKEN, USUAL_POSITION, observed
from analysis.open.probe_pairs import ProbePair
from analysis.open.stored_rows import StoredRows, changed_rows
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.layers import unembedding
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.pairs.verification import best_layout
from tiltmeter.states.capture import HiddenStates, ReadPoint
from tiltmeter.states.observed_metrics import observation_metrics
from tiltmeter.states.positions import Position
from tiltmeter.states.probe_set import DEFAULT_POSITIONS, PreferenceDirections, Probe, cut_pair
from tiltmeter.weights.random_update import FORMS, N_DRAWS, RandomUpdates, check_draws, read_random_updates

_POSITIONS = DEFAULT_POSITIONS
_HELD_AGAINST_RANDOM: tuple[Position, ...] = ("prompt_last", "content")
_LEAST_PAIRS = 4
AFTER = "aligned"
"""Name of the reading after training, where a run has that of a snapshot."""

States = dict[ReadPoint, HiddenStates]


class StateReading:
    """How hidden states are read where no run stored them: at every site, where prompts end and where responses part.

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

    def read(self, checkpoints: Checkpoints, *, n_steps: int | None = None) -> "ReadNow":
        """Read both models.

        Args:
            n_steps: optimizer steps between the two, where they are known.

        Raises:
            UserError: fewer than four pairs with finite states.
        """
        pairs = list(checkpoints.pairs[: self.n_pairs])
        probe = self._probe(checkpoints, [pair.ids for pair in pairs], _POSITIONS)
        base, policy = (probe.read(opened.model) for opened in (checkpoints.base, checkpoints.aligned))
        finite = _finite_pairs(base, policy, len(pairs))
        if len(finite) < _LEAST_PAIRS:
            raise UserError(
                f"hidden_states: expected finite states of at least {_LEAST_PAIRS} pairs, got {len(finite)} of {len(pairs)}; ask "
                "about more pairs (pairs.n_pairs), or in another dtype"
            )
        base, policy = (_of_pairs(states, finite) for states in (base, policy))
        kept = [pairs[i] for i in finite.tolist()]
        head = unembedding(checkpoints.base.model)
        directions = PreferenceDirections(head, [pair.ids for pair in kept])
        groups = [pair.group for pair in kept]
        metrics = observation_metrics(base, policy, directions, head=head, clusters=groups)
        random = None
        if any(not torch.equal(base[point].rows, policy[point].rows) for point in base):
            with suppress(UserError):  # weights that are not finite: pairs whose states are may still be looked at
                random = self._random_updates(checkpoints, [pair.ids for pair in kept], n_steps)
        rows: dict[str, StoredRows] = {
            position: _rows_at(position, base, policy, kept, self.dtype, len(pairs) - len(kept))
            for position in _POSITIONS
        }
        return ReadNow.of(metrics, rows, directions.token, n_steps, random)


@dataclass(frozen=True)
class ReadNow(Watched):
    """In place of what a run logged and stored: one reading of two models.

    Args:
        metrics: one row, named as in metrics.csv.
        snapshots: no folder.
        n_steps: optimizer steps between the two; None: not known.
        read: rows by position.
        token_directions: v = e_w − e_l of the rows at ``diverge``.
        read_random: under random weight changes; None where the two models don't differ.
    """

    n_steps: int | None
    read: Mapping[str, StoredRows]
    token_directions: Tensor
    read_random: RandomUpdates | None

    @classmethod
    def of(
        cls,
        metrics: Mapping[str, float],
        read: Mapping[str, StoredRows],
        v: Tensor,
        n_steps: int | None,
        random: RandomUpdates | None,
    ) -> "ReadNow":
        """That of an observation's metrics and rows."""
        return cls(pd.DataFrame([{STEPS_TAKEN: n_steps or 0, **metrics}]), Path(), n_steps, read, v, random)

    @property
    def n_pairs(self) -> int:
        """Pairs that were read, each with finite states."""
        return self.read[USUAL_POSITION].n_rows

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for each position and site."""
        return observed(self.metrics).assign(steps_taken=math.nan if self.n_steps is None else self.n_steps)

    @cached_property
    def random(self) -> RandomUpdates | None:
        """Read with the states."""
        return self.read_random

    @cached_property
    def rows(self) -> StoredRows | None:
        """Those at ``prompt_last``; None where nothing changed."""
        return changed_rows(self.read[USUAL_POSITION])

    @cached_property
    def parting(self) -> Parting | None:
        """Those at ``diverge``; None where nothing changed, or fewer than four pairs have one."""
        rows = changed_rows(self.read[DIVERGE])
        if rows is None or rows.n_rows < _LEAST_PAIRS:
            return None
        return Parting(rows, range(rows.n_rows), self.token_directions, "base")


def _finite_pairs(base: States, policy: States, n_pairs: int) -> Tensor:
    """Which pairs have no NaN or infinity at any site and position under either model."""
    finite = torch.ones(n_pairs, dtype=torch.bool)
    for states in (base, policy):
        for found in states.values():
            finite[found.pair_index[~found.rows.isfinite().all(1)]] = False
    return finite.nonzero()[:, 0]


def _of_pairs(states: States, pairs: Tensor) -> States:
    """The readings of some pairs, counted anew."""
    kept = {point: torch.isin(found.pair_index, pairs) for point, found in states.items()}
    return {
        point: HiddenStates(
            found.rows[kept[point]],
            torch.searchsorted(pairs, found.pair_index[kept[point]]),
            found.sides[kept[point]],
        )
        for point, found in states.items()
    }


def _rows_at(
    position: Position, base: States, policy: States, pairs: Sequence[ProbePair], dtype: str, n_left_out: int
) -> StoredRows:
    points = [point for point in base if point.position == position]
    of_rows = [pairs[i] for i in base[points[0]].pair_index.tolist()]
    return StoredRows(
        AFTER,
        position,
        dtype,
        [pair.pair_id for pair in of_rows],
        [pair.group for pair in of_rows],
        {point.site: base[point].rows for point in points},
        {point.site: policy[point].rows for point in points},
        n_left_out,
    )
