"""Does moving hidden states along one vector turn the base into the aligned model, and back? Sweeps over λ, site and vector.

Interpolation adds λ v to the base model's hidden states, inversion subtracts λ v from the aligned model's. Vectors are
estimated on one half of the held-out prompts, all numbers are of the other half.
"""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, get_args

from analysis.contract import Cost
from analysis.open.checkpoints import Checkpoints, start_scorers
from analysis.open.models import LoadedModel
from analysis.open.probe_pairs import ProbePair
from analysis.steering.directions import READ_POSITIONS, Halves, Kind, split_by_prompt
from analysis.steering.generated import GenerationSweep
from analysis.steering.table import CHOOSING, Part, Rows, Unit, nearest_to_one
from analysis.steering.teacher_forced import TeacherForcedSweep, Tokens
from analysis.steering.vectors import Norm, Vectors, Wanted, estimate_vectors
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.generation import Decoding
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM, layer_site, resolve_sites, site_depth
from tiltmeter.scoring.scorer import Scorer
from tiltmeter.states.positions import Position
from tiltmeter.steering.operators import OPERATORS, SCALED, SIGNED, Operator
from tiltmeter.steering.recovery import Direction
from tiltmeter.steering.sweep_logits import sweep_cost
from tiltmeter.steering.vector import RANDOM, RANDOM_KINDS, V_STAR, SteeringVector


class SteeringSweep:
    """Options of the sweep.

    Args:
        scorers: of generated text, by name; null leaves one out. ``degeneration`` says where steering breaks the model.
        decoding: of generated text; null: greedy, 96 tokens.
        vectors: kinds of vectors (:data:`analysis.steering.directions.KINDS`), ``KIND@POSITION`` for one whose states are read
            elsewhere than at ``position``, and files of vectors (.safetensors). v* and ``random`` are added where they are missing.
        controls: folders of runs, such as SFT's or one of shuffled labels, whose own v* is swept beside this one.
        position: where the states are read that vectors are made of: ``prompt_last``, ``diverge``, ``response_last`` or
            ``response_mean``.
        tokens: whose hidden states are moved: ``predicting``, those that a token of the response is predicted from; ``all``;
            ``new``, those after the prompt; ``prompt``.
        operator: what is done to hidden states along a vector: ``add``; ``subtract``; ``add_keeping_norm``, the sum at the state's
            length; ``project_out``, λ the share of what a state has along it that is taken out; ``clamp``, λ what it has along it
            afterwards; ``rotate``, λ radians from the base's mean state towards it. λ = 0 is the model as it is. Inversion takes
            −λ, but for project_out and clamp, which have no opposite.
        sites: where vectors are added: a site, several, or ``all``; null: after the middle block, and before and after the
            final norm.
        lambdas: strengths; 0 is added where it is missing.
        n_directions: of singular vectors and principal components.
        n_random: vectors of each random kind at each site; null: 99 at both final sites, 20 elsewhere.
        norm: how long a vector is at λ = 1. ``own``: as it was estimated, and as the v* of its site where that means nothing
            (singular vectors, principal components, probes); ``matched``: as the v* of its site; ``relative``: as the base's
            states are on average there, so that λ is a share of ‖h‖. Random vectors are as long as the one beside them.
        unrelated_prompts: file of prompts that ``unrelated_contrast`` vectors are made of; null: plain sentences of ours.
        n_prompts: test prompts that are scored teacher-forced, a pair each, at most; null: all of the second half.
        n_generated: test prompts that are completed at each λ; 0: none, then scorers have nothing to do.
        seed: of the split into halves and of the controls.
        restart: begin the table anew instead of going on with it.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        scorers: Mapping[str, Scorer | None],
        decoding: Decoding | None = None,
        vectors: Sequence[str] = (
            V_STAR,
            "v_bar",
            "v*@response_mean",
            "singular_raw",
            "difference_of_means",
            "probe",
            RANDOM,
        ),
        controls: Sequence[str] = (),
        position: Position = "prompt_last",
        tokens: Tokens = "predicting",
        operator: Operator = "add",
        sites: str | Sequence[str] | None = None,
        lambdas: Sequence[float] = (-1.0, 0.0, 0.5, 1.0, 2.0),
        n_directions: int = 1,
        n_random: int | None = None,
        norm: Norm = "own",
        unrelated_prompts: str | None = None,
        n_prompts: int | None = 32,
        n_generated: int = 64,
        seed: int = 0,
        restart: bool = False,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        least: dict[str, tuple[int | None, int]] = {
            "n_directions": (n_directions, 1),
            "n_random": (n_random, 1),
            "n_prompts": (n_prompts, 1),
            "n_generated": (n_generated, 0),
            "seed": (seed, 0),
        }
        options = {
            "dtype": (dtype, DTYPES),
            "position": (position, READ_POSITIONS),
            "tokens": (tokens, get_args(Tokens)),
            "norm": (norm, get_args(Norm)),
            "operator": (operator, OPERATORS),
        }
        check_options("steering", least, options)
        _check_lambdas(lambdas)
        self.scorers = {name: scorer for name, scorer in scorers.items() if scorer is not None}
        self.decoding, self.sites, self.tokens, self.operator = decoding or Decoding(), sites, tokens, operator
        self.notes: list[str] = []
        """Lines on what was added to what was asked for."""
        if 0.0 not in lambdas:
            self.notes.append(
                "steering.lambdas: 0 was missing and is added: the model as it is, which all else is compared with."
            )
        self.lambdas = sorted({0.0, *map(float, lambdas)})
        self.n_prompts, self.n_generated, self.seed = n_prompts, n_generated, seed
        self.restart, self.dtype, self.device = restart, dtype, device
        self.wanted = Wanted(
            self._kinds(vectors),
            files=[Path(name) for name in vectors if _is_file(name)],
            runs=[Path(folder) for folder in _listed("controls", controls)],
            position=position,
            n_directions=n_directions,
            n_random=n_random,
            norm=norm,
            unrelated=unrelated_prompts,
            seed=seed,
            dtype=dtype,
        )

    def start(self, checkpoints: Checkpoints) -> None:
        """Load or reach what scorers need, before anything is swept. Raises UserError."""
        if self.n_generated:
            start_scorers(self.scorers.values(), checkpoints)

    def plan(self, checkpoints: Checkpoints) -> "Sweep":
        """Estimate the vectors and plan; nothing is swept yet, and no scorer is started (:meth:`start`).

        Raises:
            UserError: an unknown site, too few prompts, or vectors that can't be made.
        """
        n_layers = checkpoints.base.model.config.num_hidden_layers
        sites = swept_sites(self.sites, n_layers)
        halves = split_by_prompt(checkpoints.pairs, seed=self.seed)
        vectors = estimate_vectors(checkpoints, halves.estimation, sites, self.wanted)
        return Sweep(self, checkpoints, halves, vectors)

    def _kinds(self, vectors: Sequence[str]) -> list[Kind]:
        """v* first, random ones last: v* and ``random`` are there always, since all others are compared with them."""
        asked = [Kind.of(name) for name in _listed("vectors", vectors) if not _is_file(name)]
        if len(set(asked)) < len(asked):
            raise UserError(f"steering.vectors: expected each once, got {', '.join(vectors)}")
        needed = [Kind(name, None) for name in (V_STAR, RANDOM)]
        if added := [kind.kind for kind in needed if kind not in asked]:
            self.notes.append(f"steering.vectors: {' and '.join(added)} added: what all others are compared with.")
        return sorted(dict.fromkeys([*needed, *asked]), key=lambda kind: kind.kind in RANDOM_KINDS)


class Sweep:
    """A planned sweep: its units, and the rows of each when it is asked for them."""

    def __init__(self, asked: SteeringSweep, checkpoints: Checkpoints, halves: Halves, vectors: Vectors) -> None:
        self.asked, self.checkpoints, self.halves, self.made = asked, checkpoints, halves, vectors

    @property
    def vectors(self) -> dict[tuple[str, str], SteeringVector]:
        """Steering vectors by name and site."""
        return self.made.by_key

    def random_strengths(self, site: str) -> list[float]:
        """λ of random vectors at a site, in lengths of its v*: as long as each vector where all are compared, and the longest.

        At equal norm a vector is compared with random ones of its own length; at equal KL, with all that these make of a curve.
        """
        at, unit = nearest_to_one(self.asked.lambdas), self.vectors[V_STAR, site].norm()
        if self.asked.operator not in SCALED:
            return sorted({0.0, max(self.asked.lambdas), at})
        lengths = {float(f"{v.norm() / unit:.6g}") for (_, where), v in self.vectors.items() if where == site}
        return sorted({0.0, max(self.asked.lambdas), *(at * x for x in lengths)})

    @property
    def units(self) -> list[Unit]:
        """Everything to compute; the draws of a random kind at a site are one."""
        parts: list[Part] = ["choosing", "teacher_forced"]
        if self.asked.n_generated and self.asked.scorers:
            parts.append("generated")
        return [
            Unit(direction, name, site, part)
            for part in parts
            for direction in get_args(Direction)
            for name, site in ([*self.vectors, *self.made.drawn] if part != "choosing" else self.vectors)
            if part != "choosing" or name == V_STAR
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """All that changes a number of the table, as plain values."""
        asked = self.asked
        found = {
            "lambdas": asked.lambdas,
            "sites": list(dict.fromkeys(site for _, site in self.vectors)),
            "norm": asked.wanted.norm,
            "position": asked.wanted.position,
            "tokens": asked.tokens,
            "operator": asked.operator,
            "n_random": {site: len(drawn) for (_, site), drawn in self.made.drawn.items()},
            "seed": asked.seed,
            "dtype": asked.dtype,
            "test_pairs": _pairs_fingerprint(self.halves.test),
            "n_test": len(self.tested),
            "n_estimation": len(self.halves.estimation),
            "vectors": list(self.made.made),
            "made": self.made.made,
            "values": self.made.fingerprint,
            "n_generated": asked.n_generated,
            "n_texts": min(len({p.group for p in self.halves.test}), asked.n_generated) * asked.decoding.n_samples,
        }
        if asked.n_generated:
            found |= {"decoding": asdict(asked.decoding), "scorers": {k: s.name for k, s in asked.scorers.items()}}
        return found

    def rows(self, unit: Unit) -> Rows:
        """Compute one unit."""
        found = self._rows(unit)
        return found._replace(rows=[row._replace(operator=self.asked.operator) for row in found.rows])

    def _rows(self, unit: Unit) -> Rows:
        where = unit.vector, unit.site
        vectors = self.made.drawn[where] if unit.vector in RANDOM_KINDS else [self.vectors[where]]
        if unit.part == "generated":
            return self._generation(unit.direction).rows(unit, vectors)
        strengths = self.random_strengths(unit.site) if unit.vector in RANDOM_KINDS else ()
        found = self._teacher_forced(unit.direction, unit.part).rows(unit, vectors, strengths)
        if unit.part != "choosing":
            return found
        return Rows([row._replace(metric=CHOOSING) for row in found.rows if row.metric == "recovery" and row.strength])

    @property
    def tested(self) -> list[ProbePair]:
        """Pairs that are scored teacher-forced."""
        return self.halves.test[: self.asked.n_prompts]

    @property
    def choosing(self) -> list[ProbePair]:
        """Pairs by which the site of a headline is chosen."""
        return self.halves.estimation[: self.asked.n_prompts]

    def _models(self, direction: Direction) -> tuple[LoadedModel, LoadedModel]:
        """The model that is steered, and the one that it is to become."""
        models = self.checkpoints.base, self.checkpoints.aligned
        return models if direction == "interpolation" else models[::-1]

    @cache  # noqa: B019 (a sweep lives as long as its engines)
    def _generation(self, direction: Direction) -> GenerationSweep:
        asked = self.asked
        return GenerationSweep(
            self._models(direction)[0],
            self.halves.test,
            scorers=asked.scorers,
            decoding=asked.decoding,
            n_prompts=asked.n_generated,
            sign=-1 if direction == "inversion" and asked.operator in SIGNED else 1,
            strengths=asked.lambdas,
            tokens=asked.tokens,
            operator=asked.operator,
            means=self.made.means,
        )

    @cache  # noqa: B019
    def _teacher_forced(self, direction: Direction, part: Part) -> TeacherForcedSweep:
        asked, chooses = self.asked, part == "choosing"
        return TeacherForcedSweep(
            *self._models(direction),
            self.choosing if chooses else self.tested,
            direction=direction,
            strengths=[0.0, nearest_to_one(asked.lambdas)] if chooses else asked.lambdas,
            tokens=asked.tokens,
            operator=asked.operator,
            means=self.made.means,
        )


def check_options(
    node: str, least: Mapping[str, tuple[int | None, int]], choices: Mapping[str, tuple[str, Collection[str]]]
) -> None:
    """Check numbers against the least that each may be, and texts against those that there are. Raises UserError."""
    for name, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise UserError(f"{node}.{name}: expected at least {lowest}, got {value}")
    for name, (text, known) in choices.items():
        if text not in known:
            raise UserError(f"{node}.{name}: expected one of {', '.join(known)}, got {text}")


def sweep_costs(sweep: Sweep) -> list[Cost]:
    """Passes and tokens of the units of a sweep, teacher-forced and generated."""
    asked, n_layers = sweep.asked, sweep.checkpoints.base.model.config.num_hidden_layers
    costs = []
    for part, pairs in (("choosing", sweep.choosing), ("teacher_forced", sweep.tested)):
        passes = float(len(get_args(Direction)))
        for unit in (unit for unit in sweep.units if unit.part == part):
            depth = min(site_depth(unit.site, n_layers), n_layers - 1)
            passes += sweep_cost(n_layers, depth, _n_moving(sweep, unit))
        costs.append(Cost(part.replace("_", "-"), passes, round(passes * sum(pair.n_row_tokens for pair in pairs))))
    if n := sum(unit.part == "generated" for unit in sweep.units):
        prompts = sweep.halves.test[: asked.n_generated]
        prompt_tokens = sum(len(pair.ids.prompt_ids) for pair in prompts)
        new_tokens = len(prompts) * len(asked.lambdas) * asked.decoding.max_new_tokens
        steps = float(n * asked.decoding.max_new_tokens)
        costs.append(Cost("generated, at most", steps, n * (prompt_tokens + new_tokens)))
    return costs


def _n_moving(sweep: Sweep, unit: Unit) -> int:
    """Number of vectors and strengths other than 0 in a unit."""
    if unit.part == "choosing":
        return 1
    drawn = sweep.made.drawn.get((unit.vector, unit.site))
    if drawn is None:
        return len(sweep.asked.lambdas) - 1
    return len(drawn) * (len(sweep.random_strengths(unit.site)) - 1)


def swept_sites(sites: str | Sequence[str] | None, n_layers: int) -> Sequence[str]:
    """The sites asked for; None: after the middle block, and before and after the final norm.

    >>> swept_sites(None, 4)
    ('layer_01', 'final_pre_norm', 'final_post_norm')
    """
    if sites is not None:
        return resolve_sites(sites, n_layers)
    middle = (layer_site((n_layers - 1) // 2),) if n_layers > 1 else ()
    return (*middle, FINAL_PRE_NORM, FINAL_POST_NORM)


def _check_lambdas(lambdas: Sequence[float]) -> None:
    if not (all(map(math.isfinite, lambdas)) and any(lambdas) and len(set(lambdas)) == len(lambdas)):
        raise UserError(f"steering.lambdas: expected different finite numbers, not only 0, got {list(lambdas)}")


def _is_file(name: str) -> bool:
    return str(name).endswith(".safetensors")


def _listed(key: str, given: Sequence[str]) -> Sequence[str]:
    if isinstance(given, str) or not all(isinstance(name, str) for name in given):
        raise UserError(f"steering.{key}: expected a list of names, such as [a,b], got {given}")
    return given


def _pairs_fingerprint(pairs: Sequence[ProbePair]) -> str:
    text = repr([(pair.pair_id, *map(list, pair.ids)) for pair in pairs])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
