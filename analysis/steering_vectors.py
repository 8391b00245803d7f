"""The vectors of a sweep: directions, the controls of METHOD C15 beside them, v* of other runs, and vectors of the user's own."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from torch import Tensor

from analysis.checkpoints import Checkpoints
from analysis.foreign_vectors import named_runs, open_like, vectors_of_file
from analysis.probe_pairs import ProbePair
from analysis.steering_directions import (
    CONTROLS,
    COUNTED,
    RANDOM,
    RANDOM_COVARIANCE,
    RANDOM_PCA,
    SHUFFLED,
    V_STAR,
    Kind,
    States,
    make,
    v_star,
)
from tiltmeter.controls import (
    Control,
    covariance_matched,
    norm_matched,
    random_in_span,
    random_vectors,
    shuffled_layers,
)
from tiltmeter.directions import principal_directions, steering_vector
from tiltmeter.errors import UserError
from tiltmeter.layers import layer_site
from tiltmeter.positions import Position
from tiltmeter.steering_vector import SteeringVector

Key = tuple[str, str]
"""A vector's name and its site."""
RANDOM_KINDS = (RANDOM, RANDOM_PCA, RANDOM_COVARIANCE)
_SPAN = 10
"""Principal directions of the base's states whose span ``random_pca`` is drawn from, at most."""


@dataclass(frozen=True)
class Wanted:
    """Which vectors to sweep.

    Args:
        kinds: in the order of the table.
        files: of the user's own vectors.
        runs: folders of runs whose v* is a control.
        position: where states are read.
        n_directions: of singular vectors and principal components.
        n_random: of each random kind.
        match_norms: bring the user's own vectors to the norm of v*, too.
        seed: of what is drawn.
        dtype: of the models of other runs.
    """

    kinds: Sequence[Kind]
    files: Sequence[Path] = ()
    runs: Sequence[Path] = ()
    position: Position = "prompt_last"
    n_directions: int = 1
    n_random: int = 5
    match_norms: bool = False
    seed: int = 0
    dtype: str = "float32"


@dataclass
class Vectors:
    """The vectors of a sweep, by name and site.

    Args:
        made: name → how, in words.
        notes: what a person should know before anything is run.
    """

    by_key: dict[Key, SteeringVector] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, vector: SteeringVector, how: str) -> None:
        """Add a vector that no other has the name and site of. Raises UserError."""
        if (name, vector.site) in self.by_key:
            raise UserError(f"steering.vectors: two vectors are called {name} at {vector.site}; give each once")
        self.by_key[name, vector.site] = vector
        self.made.setdefault(name, how)

    @property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of names and values: the same vectors have the same one."""
        digest = hashlib.sha256()
        for (name, site), vector in self.by_key.items():
            digest.update(f"{name} {site} ".encode() + vector.values.numpy().tobytes())
        return digest.hexdigest()[:16]


def random_kind(name: str) -> str | None:
    """Which random kind a vector of this name is of; None for all that are not random.

    >>> random_kind("random_pca_12"), random_kind("random_thoughts:layer_00")
    ('random_pca', None)
    """
    kind, _, number = name.rpartition("_")
    return kind if kind in RANDOM_KINDS and number.isdecimal() else None


def describe(vectors: Vectors) -> pd.DataFrame:
    """A row for each vector: where it lives, how it was made, its length, and its cosine with the v* of its site."""
    return pd.DataFrame(
        [
            {
                "vector": name,
                "site": site,
                "made": vector.made,
                "position": vector.position or "",
                "norm": vector.norm(),
                "cosine_with_v_star": vector.cosine(vectors.by_key[V_STAR, site]),
            }
            for (name, site), vector in vectors.by_key.items()
        ]
    )


def estimate_vectors(
    checkpoints: Checkpoints, pairs: Sequence[ProbePair], sites: Sequence[str], wanted: Wanted
) -> Vectors:
    """All vectors at all sites; all but the user's own with the norm of the site's v*.

    Args:
        pairs: that vectors are estimated from.
        sites: resolved names.

    Raises:
        UserError: the two models do not differ at a site; a kind that can't be made of these models and pairs; a run or file
            that doesn't fit.
    """
    read = [*sites, *_blocks(checkpoints)] if SHUFFLED in {kind.kind for kind in wanted.kinds} else sites
    others = [kind.position for kind in wanted.kinds if kind.position is not None]
    states = States(checkpoints, pairs, list(dict.fromkeys(read)), position=wanted.position, others=others)
    found, like = Vectors(), {site: v_star(states, site) for site in sites}
    known = _Provenance.of(checkpoints, pairs, wanted)
    for kind in wanted.kinds:
        for site in sites:
            for name, control in _of_kind(kind, states, site, like[site], wanted).items():
                position = (kind.position or wanted.position) if kind.kind not in (*CONTROLS, "v_bar") else None
                found.add(name, known.vector(site, control, position), control.provenance.partition(", at norm")[0])
    for name, run in named_runs(wanted.runs):
        base, aligned = open_like(run, checkpoints.base, wanted.dtype)
        for site, update in states.update_of(base, aligned).items():
            how = f"v* of the run {run.folder.name}"
            if site in like:
                control = _matched(update, like[site], how, name)
                found.add(name, known.vector(site, control, wanted.position), how)
    for path in wanted.files:
        _add_own(found, path, checkpoints, like, match_norms=wanted.match_norms)
    return found


@dataclass(frozen=True)
class _Provenance:
    """What is known of every vector that is estimated here."""

    facts: Mapping[str, str | int]

    @classmethod
    def of(cls, checkpoints: Checkpoints, pairs: Sequence[ProbePair], wanted: Wanted) -> "_Provenance":
        names = {side: str(getattr(checkpoints, side).model.name_or_path) for side in ("base", "aligned")}
        vocabulary = repr(sorted(checkpoints.base.tokenizer.get_vocab().items())).encode()
        digest = hashlib.sha256(vocabulary).hexdigest()[:16]
        return cls({**names, "pairs": len(pairs), "seed": wanted.seed, "tokenizer_sha256": digest})

    def vector(self, site: str, control: Control, position: Position | None) -> SteeringVector:
        values = control.vectors[0].float().cpu()
        return SteeringVector(site, values, made=control.provenance, position=position, provenance=self.facts)


def _of_kind(kind: Kind, states: States, site: str, like: Tensor, wanted: Wanted) -> dict[str, Control]:
    """Vectors of one kind at one site by name, each at the norm of ``like``."""
    if kind.kind in RANDOM_KINDS:
        drawn = _random(kind.kind, states, site, like, wanted)
        return {
            f"{kind.kind}_{i + 1}": Control(values[None], f"{drawn.provenance}, number {i + 1}")
            for i, values in enumerate(drawn.vectors)
        }
    if kind.kind == SHUFFLED:
        return {SHUFFLED: _shuffled(states, site, like, wanted.seed)}
    try:
        values, how = make(kind, states, site, wanted.n_directions)
    except ValueError as error:
        raise _cannot(kind.name(), site, error) from error
    numbers = range(1, len(values) + 1) if kind.kind in COUNTED else [None] * len(values)
    where = f" at {kind.position}" if kind.position else ""
    return {
        kind.name(number): _matched(v, like, how + where, f"{kind.name()} at {site}")
        for number, v in zip(numbers, values, strict=True)
    }


def _random(kind: str, states: States, site: str, like: Tensor, wanted: Wanted) -> Control:
    base, _ = states.rows(site, None)
    try:
        if kind == RANDOM:
            return random_vectors(like, wanted.n_random, seed=wanted.seed)
        if kind == RANDOM_COVARIANCE:
            return covariance_matched(like, base, wanted.n_random, seed=wanted.seed)
        span = principal_directions(base, min(_SPAN, len(base) - 1, base.shape[1]), centred=True).directions
        return random_in_span(like, span, wanted.n_random, seed=wanted.seed)
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
    return _matched(given[own].vectors[0], like, given[own].provenance.partition(",")[0], SHUFFLED)


def _matched(values: Tensor, like: Tensor, how: str, name: str) -> Control:
    try:
        return norm_matched(values[None], like, provenance=how)
    except ValueError as error:
        raise UserError(f"steering.vectors: {name}: {error}; leave it out") from error


def _cannot(name: str, site: str, error: ValueError) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(f"steering.vectors: {name} at {site}: cannot be made of these models and pairs ({error})")


def _blocks(checkpoints: Checkpoints) -> list[str]:
    return _block_names(checkpoints.base.model.config.num_hidden_layers)


def _block_names(n_layers: int) -> list[str]:
    return [layer_site(i) for i in range(n_layers)]


def _add_own(
    found: Vectors, path: Path, checkpoints: Checkpoints, like: Mapping[str, Tensor], *, match_norms: bool
) -> None:
    """The vectors of a file that are at swept sites, each as ``FILE:NAME``."""
    held = vectors_of_file(path, checkpoints.base.model, list(like))
    there = {name: vector for name, vector in held.items() if vector.site in like}
    if left := len(held) - len(there):
        found.notes.append(f"{path}: {len(there)} of {len(held)} vectors are swept; {left} are at other sites.")
    for name, vector in there.items():
        own = vector * (float(like[vector.site].norm()) / vector.norm()) if match_norms else vector
        found.add(f"{path.stem}:{name}", own, f"{vector.made}, from {path.name}")
