"""The vectors of a sweep: directions, the controls of METHOD C15 beside them, v* of other runs, and vectors of the user's own."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Literal

import pandas as pd
from torch import Tensor

from analysis.open.checkpoints import Checkpoints
from analysis.open.foreign_vectors import open_like, runs_by_arm, vectors_of_file
from analysis.open.probe_pairs import ProbePair
from analysis.steering.directions import COUNTED, Kind, States, make, v_star
from analysis.steering.unrelated_prompts import unrelated_ids
from tiltmeter.errors import UserError
from tiltmeter.geometry.directions import principal_directions, steering_vector
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM, layer_site
from tiltmeter.states.positions import Position
from tiltmeter.steering.controls import (
    Control,
    covariance_matched,
    draw_seeds,
    norm_matched,
    random_in_span,
    random_vectors,
    shuffled_layers,
    unrelated_contrasts,
)
from tiltmeter.steering.vector import (
    OWN,
    RANDOM,
    RANDOM_COVARIANCE,
    RANDOM_KINDS,
    SHUFFLED,
    UNRELATED,
    V_STAR,
    SteeringVector,
    VectorId,
)

Key = tuple[str, str]
"""A vector's name, or a random kind, and its site."""
Norm = Literal["own", "relative", "matched"]
"""Length of a vector at λ = 1: as it was estimated; as the base's states are on average; as the v* of its site."""
N_RANDOM_FINAL, N_RANDOM = 99, 20
"""Draws of each random kind at both final sites, where one pass through the blocks serves all, and at any other site."""
_SPAN = 10
"""Principal directions of the base's states whose span ``random_pca`` is drawn from, at most."""


@dataclass(frozen=True)
class Wanted:
    """Selection of the vectors to sweep.

    Args:
        kinds: in the order of the table.
        files: of the user's own vectors.
        runs: folders of runs whose v* is a control.
        position: where states are read.
        n_directions: of singular vectors and principal components.
        n_random: of each random kind at a site; None: :data:`N_RANDOM_FINAL` or :data:`N_RANDOM`.
        norm: of what isn't random.
        unrelated: file of prompts that have nothing to do with the preference; None: those that come with the package.
        seed: of what is drawn.
        dtype: of the models of other runs.
    """

    kinds: Sequence[Kind]
    files: Sequence[Path] = ()
    runs: Sequence[Path] = ()
    position: Position = "prompt_last"
    n_directions: int = 1
    n_random: int | None = None
    norm: Norm = "own"
    unrelated: str | None = None
    seed: int = 0
    dtype: str = "float32"


@dataclass
class Vectors:
    """The vectors of a sweep, by name and site.

    Args:
        by_key: vectors that are judged.
        drawn: random kind and site → the draws.
        made: name or kind → how, in words.
        means: mean state of the base by site.
        notes: what a person should know before anything is run.
    """

    by_key: dict[Key, SteeringVector] = field(default_factory=dict)
    drawn: dict[Key, list[SteeringVector]] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, vector: SteeringVector, how: str) -> None:
        """Add a vector that no other has the name and site of. Raises UserError."""
        if (name, vector.site) in self.by_key:
            raise UserError(f"steering.vectors: two vectors are called {name} at {vector.site}; give each once")
        self.by_key[name, vector.site] = vector
        self.made.setdefault(name, how)

    def named(self) -> Iterator[tuple[str, int, SteeringVector]]:
        """All vectors with their name or kind, and the number of the draw, 0 for those that aren't random."""
        for (name, _), vector in self.by_key.items():
            yield name, 0, vector
        for (kind, _), drawn in self.drawn.items():
            for vector in drawn:
                yield kind, vector.id.draw, vector

    @property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of names and values: the same vectors have the same one."""
        digest = hashlib.sha256()
        for name, draw, vector in self.named():
            digest.update(f"{name} {draw} {vector.site} ".encode() + vector.values.numpy().tobytes())
        return digest.hexdigest()[:16]


def n_drawn(site: str, n_random: int | None) -> int:
    """Number of vectors of a random kind at a site: as asked for, else what the site affords.

    >>> n_drawn("layer_00", None), n_drawn("final_post_norm", None), n_drawn("layer_00", 7)
    (20, 99, 7)
    """
    return n_random or (N_RANDOM_FINAL if site in (FINAL_PRE_NORM, FINAL_POST_NORM) else N_RANDOM)


def describe(vectors: Vectors) -> pd.DataFrame:
    """A row for each vector: where it lives, how it was made, its length, and its cosine with the v* of its site."""
    return pd.DataFrame(
        [
            {
                "vector": name,
                "draw": draw or "",
                "site": vector.site,
                "made": vector.made,
                "position": vector.id.position or "",
                "norm": vector.norm(),
                "cosine_with_v_star": vector.cosine(vectors.by_key[V_STAR, vector.site]),
                "kind": vector.id.kind,
                "number": vector.id.draw,
                "source": vector.id.source,
            }
            for name, draw, vector in vectors.named()
        ]
    )


def estimate_vectors(
    checkpoints: Checkpoints, pairs: Sequence[ProbePair], sites: Sequence[str], wanted: Wanted
) -> Vectors:
    """Estimate or draw all vectors at all sites.

    Args:
        pairs: that vectors are estimated from.
        sites: resolved names.

    Raises:
        UserError: the two models do not differ at a site; a kind that can't be made of these models and pairs; a run or file
            that doesn't fit.
    """
    states = _states_for(checkpoints, pairs, sites, wanted)
    found = Vectors(means={site: states.rows(site, None)[0].double().mean(0).float().cpu() for site in sites})
    like = {site: _unit_of_length(states, site, wanted) for site in sites}
    known = _Provenance.of(checkpoints, pairs, wanted)
    for kind, site in product(wanted.kinds, sites):
        if kind.kind in RANDOM_KINDS:
            drawn = _random(kind.kind, states, site, like[site], wanted)
            found.made[kind.kind] = drawn.how
            found.drawn[kind.kind, site] = known.vectors(VectorId(kind.kind, site), drawn)
            continue
        position = kind.read_at(wanted.position)
        for number, control in _of_kind(kind, states, site, like[site], wanted).items():
            (vector,) = known.vectors(VectorId(kind.kind, site, position, number), control)
            found.add(kind.name(number), vector, control.how)
    is_matched = wanted.norm != "own"
    for arm, run in runs_by_arm(wanted.runs):
        updates = states.update_of(*open_like(run, checkpoints.base, wanted.dtype))
        name, how = f"{V_STAR}_of_{arm}", f"v* of the run {run.folder.name}"
        for site in filter(like.__contains__, updates):
            control = _at_length(updates[site], like[site], how, name, is_matched=is_matched)
            (vector,) = known.vectors(VectorId(V_STAR, site, wanted.position, source=arm), control)
            found.add(name, vector, how)
    for path in wanted.files:
        _add_own(found, path, checkpoints, like, is_matched=is_matched)
    return found


def _states_for(checkpoints: Checkpoints, pairs: Sequence[ProbePair], sites: Sequence[str], wanted: Wanted) -> States:
    """States at the sites, blocks and positions that the kinds of vectors need."""
    kinds = {kind.kind for kind in wanted.kinds}
    blocks = _block_names(checkpoints.base.model.config.num_hidden_layers) if SHUFFLED in kinds else []
    return States(
        checkpoints,
        pairs,
        list(dict.fromkeys([*sites, *blocks])),
        position=wanted.position,
        others=[kind.position for kind in wanted.kinds if kind.position is not None],
        unrelated=unrelated_ids(checkpoints.base, wanted.unrelated, key="steering.unrelated_prompts")
        if UNRELATED in kinds
        else [],
    )


def _unit_of_length(states: States, site: str, wanted: Wanted) -> Tensor:
    """v* of a site at the length that λ = 1 stands for where a vector has none of its own."""
    found = v_star(states, site)
    if wanted.norm != "relative":
        return found
    base, _ = states.rows(site, None)
    relative: Tensor = found / found.norm() * base.double().norm(dim=1).mean()
    return relative


@dataclass(frozen=True)
class _Provenance:
    """Facts that are known of every vector that is estimated here."""

    facts: Mapping[str, str | int]

    @classmethod
    def of(cls, checkpoints: Checkpoints, pairs: Sequence[ProbePair], wanted: Wanted) -> "_Provenance":
        names = {side: str(getattr(checkpoints, side).model.name_or_path) for side in ("base", "aligned")}
        vocabulary = repr(sorted(checkpoints.base.tokenizer.get_vocab().items())).encode()
        digest = hashlib.sha256(vocabulary).hexdigest()[:16]
        return cls({**names, "pairs": len(pairs), "seed": wanted.seed, "tokenizer_sha256": digest})

    def vectors(self, first: VectorId, control: Control) -> list[SteeringVector]:
        """One vector with this identity, or draws that are counted from 1."""
        rows = control.vectors.float().cpu()
        ids = [first] if len(rows) == 1 and first.kind not in RANDOM_KINDS else _counted(first, len(rows))
        return [
            SteeringVector(one, values, made=control.made, provenance=self.facts)
            for one, values in zip(ids, rows, strict=True)
        ]


def _counted(first: VectorId, n: int) -> list[VectorId]:
    return [first._replace(draw=i) for i in range(1, n + 1)]


def _of_kind(kind: Kind, states: States, site: str, like: Tensor, wanted: Wanted) -> dict[int, Control]:
    """Vectors of one kind at one site by their number; 0: there is one."""
    if kind.kind == SHUFFLED:
        return {0: _shuffled(states, site, like, wanted.seed)}
    try:
        values, how, has_length = make(kind, states, site, wanted.n_directions)
    except ValueError as error:
        raise _cannot(kind.name(), site, error) from error
    numbers = range(1, len(values) + 1) if kind.kind in COUNTED else range(len(values))
    where = f" at {kind.position}" if kind.position else ""
    is_matched = wanted.norm != "own" or not has_length
    return {
        number: _at_length(v, like, how + where, f"{kind.name()} at {site}", is_matched=is_matched)
        for number, v in zip(numbers, values, strict=True)
    }


def _random(kind: str, states: States, site: str, like: Tensor, wanted: Wanted) -> Control:
    base, _ = states.rows(site, None)
    seeds = draw_seeds(n_drawn(site, wanted.n_random), kind=kind, site=site, seed=wanted.seed)
    try:
        if kind == RANDOM:
            return random_vectors(like, seeds)
        if kind == RANDOM_COVARIANCE:
            return covariance_matched(like, base, seeds)
        if kind == UNRELATED:
            return unrelated_contrasts(like, states.unrelated(site), seeds)
        span = principal_directions(base, min(_SPAN, len(base) - 1, base.shape[1]), centred=True).directions
        return random_in_span(like, span, seeds)
    except ValueError as error:
        raise _cannot(kind, site, error) from error


def _shuffled(states: States, site: str, like: Tensor, seed: int) -> Control:
    """v* of another block. Both final sites come after the last one; blocks without an update have none to give."""
    blocks = {name: steering_vector(*states.rows(name, None)) for name in _block_names(states.n_layers)}
    own = site if site in blocks else layer_site(states.n_layers - 1)
    try:
        given = shuffled_layers({name: v for name, v in blocks.items() if float(v.norm()) > 0}, seed=seed)
    except ValueError as error:
        raise _cannot(SHUFFLED, site, error) from error
    if own not in given:
        raise _cannot(SHUFFLED, site, ValueError(f"{own} has no update"))
    return _at_length(given[own].vectors[0], like, given[own].how, SHUFFLED, is_matched=True)


def _at_length(values: Tensor, like: Tensor, how: str, name: str, *, is_matched: bool) -> Control:
    """A vector as it is, or at the norm of ``like``; of zeros it is refused."""
    try:
        return norm_matched(values[None], like if is_matched else values, how=how)
    except ValueError as error:
        raise UserError(f"steering.vectors: {name}: {error}; leave it out") from error


def _cannot(name: str, site: str, error: ValueError) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(f"steering.vectors: {name} at {site}: cannot be made of these models and pairs ({error})")


def _block_names(n_layers: int) -> list[str]:
    return [layer_site(i) for i in range(n_layers)]


def _add_own(
    found: Vectors, path: Path, checkpoints: Checkpoints, like: Mapping[str, Tensor], *, is_matched: bool
) -> None:
    """The vectors of a file that are at swept sites, each as ``FILE:NAME``."""
    held = vectors_of_file(path, checkpoints.base.model, list(like))
    there = {name: vector for name, vector in held.items() if vector.site in like}
    if left := len(held) - len(there):
        found.notes.append(f"{path}: {len(there)} of {len(held)} vectors are swept; {left} are at other sites.")
    for name, vector in there.items():
        own = vector.scaled(float(like[vector.site].norm()) / vector.norm()) if is_matched else vector
        own = replace(own, id=own.id._replace(kind=OWN, source=path.name))
        found.add(f"{path.stem}:{name}", own, f"{vector.made}, from {path.name}")
