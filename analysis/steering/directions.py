"""Vectors to steer with, estimated on one half of the held-out prompts so that the other half can test them.

What a vector is called says what it is made of: ``KIND``, for several of a kind ``KIND_1`` …, and behind an ``@`` the position
of the states where it is not ``steering.position``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.open.checkpoints import Checkpoints
from analysis.open.models import LoadedModel
from analysis.open.probe_pairs import ProbePair
from tiltmeter.errors import UserError
from tiltmeter.geometry.directions import difference_of_means, principal_directions, steering_vector, update_directions
from tiltmeter.models.layers import FINAL_POST_NORM, unembedding
from tiltmeter.pairs.batch import CHOSEN, REJECTED, TokenizedPair
from tiltmeter.pairs.verification import best_layout
from tiltmeter.scoring.preference_classifier import classifier_direction
from tiltmeter.states.capture import Reading, ReadPoint
from tiltmeter.states.positions import POSITIONS, Position
from tiltmeter.states.probe_set import PreferenceDirections, Probe
from tiltmeter.steering.vector import (
    DIFFERENCE,
    PCA_CENTRED,
    PCA_RAW,
    PROBE,
    RANDOM_KINDS,
    SHUFFLED,
    SINGULAR_CENTRED,
    SINGULAR_RAW,
    V_BAR,
    V_STAR,
)

READ_POSITIONS: tuple[Position, ...] = tuple(p for p in POSITIONS if p != "response_all")
"""Positions at which states can be read: one row a pair or a response."""
_OF_RESPONSES: tuple[Position, ...] = ("response_mean", "response_last")
"""Positions at which chosen and rejected have a state each; the first is the usual one."""


class Halves(NamedTuple):
    """Pairs that share no prompt: vectors come from the first half, all numbers from the second."""

    estimation: list[ProbePair]
    test: list[ProbePair]


class Kind(NamedTuple):
    """A kind of vector that is to be swept.

    >>> Kind.of("v*@diverge"), Kind.of("probe").name()
    (Kind(kind='v*', position='diverge'), 'probe@response_mean')
    """

    kind: str
    position: Position | None
    """Position of its states; None: at ``steering.position``, or it isn't made of states."""

    @classmethod
    def of(cls, text: str) -> "Kind":
        """A kind as it is written in ``steering.vectors``. Raises UserError."""
        kind, at, place = text.partition("@")
        if kind not in KINDS:
            raise UserError(
                f"steering.vectors: {text}: expected a file of vectors (.safetensors) or one of {', '.join(KINDS)}"
            )
        known = _OF_RESPONSES if kind in (DIFFERENCE, PROBE) else () if kind in WITHOUT_POSITION else READ_POSITIONS
        if at and place not in known:
            raise UserError(
                f"steering.vectors: {text}: expected {kind}{''.join(f', {kind}@{p}' for p in known)}, got position {place!r}"
            )
        default = _OF_RESPONSES[0] if kind in (DIFFERENCE, PROBE) else None
        return cls(kind, place if at else default)  # type: ignore[arg-type]

    def read_at(self, usual: Position) -> Position | None:
        """Position that its states are read at; None: it isn't made of states."""
        return None if self.kind in WITHOUT_POSITION else self.position or usual

    def name(self, number: int = 0) -> str:
        """Vector name in tables; ``number`` selects one of several, from 1."""
        counted = f"{self.kind}_{number}" if number else self.kind
        return counted if self.position is None else f"{counted}@{self.position}"


class Made(NamedTuple):
    """Vectors of one kind at one site and how they were made."""

    values: Tensor
    how: str
    has_length: bool = True
    """Whether the vectors' length means something; that of a singular vector or a probe does not."""


class States:
    """Hidden states of the pairs that vectors are estimated on, in both models, at all sites and positions that are asked for.

    Args:
        pairs: that vectors are estimated from.
        sites: resolved names.
        position: the usual one.
        others: further positions.
        unrelated: token ids of prompts that have nothing to do with the preference.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        pairs: Sequence[ProbePair],
        sites: Sequence[str],
        *,
        position: Position,
        others: Sequence[Position] = (),
        unrelated: Sequence[Sequence[int]] = (),
    ) -> None:
        self.position, self.ids = position, [pair.ids for pair in pairs]
        self._groups = [pair.group for pair in pairs]
        self.n_layers = checkpoints.base.model.config.num_hidden_layers
        self.sites = sites
        self.head = unembedding(checkpoints.base.model)
        positions = list(dict.fromkeys([position, *others]))
        self._probe = Probe.of_pairs(
            self.ids, layout=best_layout(checkpoints.base.model, self.ids), sites=sites, positions=positions
        )
        self._base_model, self._unrelated_ids = checkpoints.base, [list(ids) for ids in unrelated]
        self._unrelated: Reading | None = None
        self._read = self._probe.read_pair(checkpoints.base.model, checkpoints.aligned.model)

    def rows(self, site: str, position: Position | None) -> tuple[Tensor, Tensor]:
        """States of base and aligned model, a row a reading."""
        return self._read.rows(ReadPoint(site, position or self.position))

    def groups(self, site: str, position: Position | None) -> list[str]:
        """Prompt of each row of :meth:`rows`."""
        return [
            self._groups[i] for i in self._read.base[ReadPoint(site, position or self.position)].pair_index.tolist()
        ]

    def of_responses(self, site: str, position: Position | None) -> tuple[Tensor, Tensor]:
        """States of chosen and of rejected responses in the base model, a row a pair."""
        rows, _, sides = self._read.base[ReadPoint(site, position or self.position)]
        return rows[sides == CHOSEN], rows[sides == REJECTED]

    def unrelated(self, site: str) -> Tensor:
        """States of the base model at the last token of unrelated prompts, a row a prompt."""
        if self._unrelated is None:
            pairs = [TokenizedPair(ids, ids[-1:], ids[-1:]) for ids in self._unrelated_ids]
            layout = best_layout(self._base_model.model, pairs)
            probe = Probe.of_pairs(pairs, layout=layout, sites=self.sites, positions=["prompt_last"])
            self._unrelated = probe.read(self._base_model.model)
        return self._unrelated[ReadPoint(site, "prompt_last")].rows

    def update_of(self, base: LoadedModel, aligned: LoadedModel) -> dict[str, Tensor]:
        """v* of two other models by site, on the same pairs at the usual position."""
        found = self._probe.read_pair(base.model, aligned.model).steering_vectors()
        return {site: found[ReadPoint(site, self.position)] for site in self.sites}


def split_by_prompt(pairs: Sequence[ProbePair], *, seed: int) -> Halves:
    """Draw half of the prompts, rounded down, for estimating vectors; the others test them.

    Raises:
        UserError: fewer than four prompts.
    """
    prompts = sorted({pair.group for pair in pairs})
    if len(prompts) < 4:
        raise UserError(
            f"pairs: expected held-out pairs of at least 4 prompts, half to estimate vectors and half to test them, got "
            f"{len(prompts)}; train with a larger datamodule.probe_pairs, or ask about more pairs with pairs.n_pairs"
        )
    order = np.random.default_rng(seed).permutation(len(prompts))
    drawn = {prompts[i] for i in order[: len(prompts) // 2]}
    return Halves([p for p in pairs if p.group in drawn], [p for p in pairs if p.group not in drawn])


def v_star(states: States, site: str, position: Position | None = None) -> Tensor:
    """v* of a site, in float64.

    Raises:
        UserError: the two models do not differ there.
    """
    found = steering_vector(*states.rows(site, position))
    if not float(found.norm()) > 0:
        raise UserError(
            f"aligned: expected a model whose hidden states at {site} are not the base's, got the same ones, so there is no v*; "
            "give two checkpoints that differ, or other sites"
        )
    return found


def make(kind: Kind, states: States, site: str, n_directions: int) -> Made:
    """Vectors of a kind at a site; none where they only exist at another one (v̄: at ``final_post_norm``).

    Args:
        n_directions: of singular vectors and principal components.

    Raises:
        ValueError: more directions than there are.
    """
    return _MAKERS[kind.kind](kind, states, site, n_directions)


def _mean_update(kind: Kind, states: States, site: str, _: int) -> Made:
    return Made(v_star(states, site, kind.position)[None], "mean of h_policy - h_base")


def _mean_unembedding(_: Kind, states: States, site: str, __: int) -> Made:
    how = "mean of unembedding rows, chosen less rejected"
    if site != FINAL_POST_NORM:
        return Made(torch.empty(0, 0), how)
    return Made(PreferenceDirections(states.head, states.ids).sequence.mean(0).detach()[None], how)


def _singular(kind: Kind, states: States, site: str, n_directions: int, *, centred: bool) -> Made:
    found = update_directions(*states.rows(site, kind.position), n_directions, centred=centred)
    what = "h_policy - h_base" + (" less its mean" if centred else "")
    return Made(found.directions, f"singular vector of {what}, on the side of v*", has_length=False)


def _pca(kind: Kind, states: States, site: str, n_directions: int, *, centred: bool) -> Made:
    base, policy = states.rows(site, kind.position)
    found = principal_directions(base, n_directions, centred=centred).directions
    along = found @ steering_vector(base, policy)
    what = "h_base less its mean" if centred else "h_base, not centred"
    signed = found * torch.where(along < 0, -1.0, 1.0)[:, None]
    return Made(signed, f"principal direction of {what}, on the side of v*", has_length=False)


def _difference(kind: Kind, states: States, site: str, _: int) -> Made:
    found = difference_of_means(*states.of_responses(site, kind.position))
    return Made(found[None], "mean of h_base of chosen responses less that of rejected ones")


def _probe(kind: Kind, states: States, site: str, _: int) -> Made:
    chosen, rejected = states.of_responses(site, kind.position)
    found = classifier_direction(chosen.double() - rejected.double())
    return Made(found[None], "logistic probe on h_base of chosen less rejected responses", has_length=False)


_MAKERS: dict[str, Callable[[Kind, States, str, int], Made]] = {
    V_STAR: _mean_update,
    V_BAR: _mean_unembedding,
    SINGULAR_RAW: partial(_singular, centred=False),
    SINGULAR_CENTRED: partial(_singular, centred=True),
    PCA_RAW: partial(_pca, centred=False),
    PCA_CENTRED: partial(_pca, centred=True),
    DIFFERENCE: _difference,
    PROBE: _probe,
}
CONTROLS = (*RANDOM_KINDS, SHUFFLED)
KINDS = (*_MAKERS, *CONTROLS)
"""Names that ``steering.vectors`` takes, beside files."""
COUNTED = (SINGULAR_RAW, SINGULAR_CENTRED, PCA_RAW, PCA_CENTRED)
"""Kinds of which there are several."""
WITHOUT_POSITION = (V_BAR, *CONTROLS)
