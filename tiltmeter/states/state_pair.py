"""Base and policy side by side: hidden states of the same tokens in both models, from where they are read to the figure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltmeter.geometry.directions import steering_vector
from tiltmeter.models.layers import site_depth
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.states.capture import HiddenStates, Reading, ReadPoint
from tiltmeter.states.positions import Position

_ANY_DEPTH = 10**6


@dataclass(frozen=True)
class StatePair:
    """Hidden states of the same tokens in the base model and in the policy, at every site and position that was read.

    Read while training, stored by a run or read again later: what they are asked for can't tell.

    Args:
        base, policy: what each model's reading gave (:meth:`tiltmeter.states.probe_set.Probe.read`).
        pair_ids, clusters: id and prompt of each pair, by ``pair_index``; None: pairs by number, each with a prompt of its own.
        tokens: token ids of each pair, as far as they are known.
        name: of the policy's reading: ``epoch=001``, ``aligned``.
        steps_taken: optimizer steps between the two models; None: not known.
        dtype: that the rows were stored or read in.
        n_left_out: pairs with NaN or infinity, which are not here.

    Raises:
        ValueError: the two readings are of other tokens.
    """

    base: Reading
    policy: Reading
    pair_ids: Sequence[str] | None = None
    clusters: Sequence[str] | None = None
    tokens: Sequence[TokenizedPair] = ()
    name: str = "policy"
    steps_taken: int | None = None
    dtype: str = "float32"
    n_left_out: int = 0

    def __post_init__(self) -> None:
        for point, (_, pairs, sides) in self.policy.items():
            if point not in self.base or not all(map(torch.equal, (pairs, sides), self.base[point][1:])):
                raise ValueError(
                    f"states: rows at {point.site}, {point.position} are of other pairs in the two readings"
                )

    @property
    def points(self) -> list[ReadPoint]:
        """Sites and positions, in the order of the forward pass."""
        return sorted(self.policy, key=lambda point: site_depth(point.site, _ANY_DEPTH))

    @property
    def positions(self) -> list[Position]:
        """Positions that were read."""
        return list(dict.fromkeys(point.position for point in self.policy))

    @property
    def n_rows(self) -> int:
        """Rows at the first site and position."""
        return len(self.policy[self.points[0]].rows) if self.policy else 0

    def at(self, position: Position) -> "StatePair":
        """The rows of one position alone."""
        base, policy = (
            {p: x for p, x in states.items() if p.position == position} for states in (self.base, self.policy)
        )
        return replace(self, base=base, policy=policy)

    def of_pairs(self, kept: Int[Tensor, " kept"]) -> "StatePair":
        """The rows of some pairs, counted anew.

        Args:
            kept: by ``pair_index``, rising.
        """

        def of_reading(states: Reading) -> Reading:
            there = {point: torch.isin(found.pair_index, kept) for point, found in states.items()}
            return {
                point: HiddenStates(
                    rows[there[point]], torch.searchsorted(kept, pairs[there[point]]), sides[there[point]]
                )
                for point, (rows, pairs, sides) in states.items()
            }

        ids, clusters = (
            [names[i] for i in kept.tolist()] if names else None for names in (self.pair_ids, self.clusters)
        )
        tokens = [self.tokens[i] for i in kept.tolist()] if self.tokens else ()
        base, policy = of_reading(self.base), of_reading(self.policy)
        return replace(self, base=base, policy=policy, pair_ids=ids, clusters=clusters, tokens=tokens)

    def finite(self) -> "StatePair":
        """The pairs without NaN or infinity at any site and position under either model; the others are counted."""
        n_pairs = 1 + max((int(found.pair_index.max()) for found in self.base.values() if len(found.rows)), default=-1)
        is_finite = torch.ones(max(n_pairs, len(self.pair_ids or ())), dtype=torch.bool)
        for states in (self.base, self.policy):
            for rows, pairs, _ in states.values():
                is_finite[pairs[~rows.isfinite().all(1)]] = False
        n_lost = int((~is_finite).sum())
        if not n_lost:
            return self
        return replace(self.of_pairs(is_finite.nonzero()[:, 0]), n_left_out=self.n_left_out + n_lost)

    def has_changed(self) -> bool:
        """Whether any row differs between the two models."""
        return any(not torch.equal(self.base[point].rows, found.rows) for point, found in self.policy.items())

    def rows(self, point: ReadPoint) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"]]:
        """Rows of base and policy at a site and position."""
        return self.base[point].rows, self.policy[point].rows

    def update(self, point: ReadPoint) -> Float[Tensor, "row d_model"]:
        """ΔH = h_π − h_0, in float64."""
        base, policy = self.rows(point)
        return policy.double() - base.double()

    def ids_of(self, point: ReadPoint) -> list[str]:
        """Pair id of each row; a pair has two rows where each response has its own token."""
        return self._named(self.pair_ids, point)

    def clusters_of(self, point: ReadPoint) -> list[str]:
        """Prompt of each row."""
        return self._named(self.clusters, point)

    def steering_vectors(self) -> dict[ReadPoint, Float[Tensor, " d_model"]]:
        """v* at every site and position that has rows, float64."""
        return {point: steering_vector(*self.rows(point)) for point in self.policy if len(self.policy[point].rows)}

    def _named(self, names: Sequence[str] | None, point: ReadPoint) -> list[str]:
        return [names[i] if names else str(i) for i in self.policy[point].pair_index.tolist()]
