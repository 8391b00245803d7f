"""Does moving hidden states along one vector turn the base into the aligned model, and back? Sweeps over λ, site and vector.

Interpolation adds λ v to the base model's hidden states, inversion subtracts λ v from the aligned model's. Vectors are
estimated on one half of the held-out prompts, all numbers are of the other half.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from analysis.checkpoints import Checkpoints
from analysis.costs import Cost
from analysis.generation_sweep import GenerationSweep
from analysis.probe_pairs import ProbePair
from analysis.steering_directions import RANDOM, Halves, estimate_vectors, fingerprint, split_by_prompt
from analysis.sweep_table import Kind, Row, Unit
from analysis.teacher_forced_sweep import TeacherForcedSweep
from datamodules.oracle import PlantedOracle
from tiltmeter.errors import UserError
from tiltmeter.generation import Decoding
from tiltmeter.layers import FINAL_POST_NORM, FINAL_PRE_NORM, layer_site, resolve_sites, site_depth
from tiltmeter.models import DTYPES
from tiltmeter.recovery import Direction
from tiltmeter.scoring.scorer import Scorer
from tiltmeter.steering_vector import SteeringVector
from tiltmeter.sweeping import sweep_cost


class SteeringSweep:
    """What to sweep.

    Args:
        scorers: of generated text, by name; null leaves one out. ``degeneration`` says where steering breaks the model.
        decoding: of generated text; null: greedy, 96 tokens.
        sites: where vectors are added: a site, several, or ``all``; null: after the middle block, and before and after the
            final norm.
        lambdas: strengths; 0 is added where it is missing.
        n_random: random controls of each site, with the norm of its v*.
        n_prompts: test prompts that are scored teacher-forced, a pair each, at most; null: all of the second half.
        n_generated: test prompts that are completed at each λ; 0: none, then scorers have nothing to do.
        seed: of the split into halves and of the controls.
        restart: begin the table anew instead of going on with it.
        dry_run: only say what would be run.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        scorers: Mapping[str, Scorer | None],
        decoding: Decoding | None = None,
        sites: str | Sequence[str] | None = None,
        lambdas: Sequence[float] = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0),
        n_random: int = 5,
        n_prompts: int | None = 32,
        n_generated: int = 8,
        seed: int = 0,
        restart: bool = False,
        dry_run: bool = False,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        least: dict[str, tuple[int | None, int]] = {
            "n_random": (n_random, 1),
            "n_prompts": (n_prompts, 1),
            "n_generated": (n_generated, 0),
            "seed": (seed, 0),
        }
        for name, (value, lowest) in least.items():
            if value is not None and value < lowest:
                raise UserError(f"steering.{name}: expected at least {lowest}, got {value}")
        if not all(math.isfinite(x) for x in lambdas) or not any(lambdas) or len(set(lambdas)) < len(lambdas):
            raise UserError(f"steering.lambdas: expected different finite numbers, not only 0, got {list(lambdas)}")
        if dtype not in DTYPES:
            raise UserError(f"steering.dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
        self.scorers = {name: scorer for name, scorer in scorers.items() if scorer is not None}
        self.decoding, self.sites = decoding or Decoding(), sites
        self.added_zero = 0.0 not in lambdas
        self.lambdas = sorted({0.0, *map(float, lambdas)})
        self.n_random, self.n_prompts, self.n_generated, self.seed = n_random, n_prompts, n_generated, seed
        self.restart, self.dry_run, self.dtype, self.device = restart, dry_run, dtype, device

    def start(self, checkpoints: Checkpoints) -> "Sweep":
        """Load or reach what scorers need, estimate the vectors, and plan; nothing is swept yet.

        Raises:
            UserError: an unknown site, too few prompts, or a scorer that can't start.
        """
        n_layers = checkpoints.base.model.config.num_hidden_layers
        sites = default_sites(n_layers) if self.sites is None else resolve_sites(self.sites, n_layers)
        halves = split_by_prompt(checkpoints.pairs, seed=self.seed)
        if self.n_generated and not self.dry_run:
            for scorer in self.scorers.values():
                if isinstance(scorer, PlantedOracle):
                    scorer.use_world(checkpoints.world)
                scorer.start()
        vectors = estimate_vectors(checkpoints, halves.estimation, sites, n_random=self.n_random, seed=self.seed)
        return Sweep(self, checkpoints, halves._replace(test=halves.test[: self.n_prompts]), vectors)


class Sweep:
    """A planned sweep: its units, and the rows of each when it is asked for them."""

    def __init__(
        self,
        asked: SteeringSweep,
        checkpoints: Checkpoints,
        halves: Halves,
        vectors: dict[tuple[str, str], SteeringVector],
    ) -> None:
        self.asked, self.checkpoints, self.halves, self.vectors = asked, checkpoints, halves, vectors
        self._engines: dict[tuple[Direction, Kind], TeacherForcedSweep | GenerationSweep] = {}

    @property
    def units(self) -> list[Unit]:
        """Everything to compute. Text is generated with v*, v̄ and the first random control of a site."""
        kinds: list[Kind] = ["teacher_forced"]
        if self.asked.n_generated and self.asked.scorers:
            kinds.append("generated")
        return [
            Unit(direction, name, site, kind)
            for kind in kinds
            for direction in get_args(Direction)
            for name, site in self.vectors
            if kind == "teacher_forced" or not name.startswith(RANDOM) or name == f"{RANDOM}1"
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """All that changes a number of the table, as plain values."""
        asked = self.asked
        found = {
            "lambdas": asked.lambdas,
            "sites": list(dict.fromkeys(site for _, site in self.vectors)),
            "n_random": asked.n_random,
            "seed": asked.seed,
            "dtype": asked.dtype,
            "test_pairs": _pairs_fingerprint(self.halves.test),
            "n_test": len(self.halves.test),
            "n_estimation": len(self.halves.estimation),
            "vectors": fingerprint(self.vectors),
            "n_generated": asked.n_generated,
        }
        if asked.n_generated:
            found |= {"decoding": asdict(asked.decoding), "scorers": {k: s.name for k, s in asked.scorers.items()}}
        return found

    def rows(self, unit: Unit) -> list[Row]:
        """Compute one unit."""
        key = unit.direction, unit.kind
        if key not in self._engines:
            self._engines[key] = self._engine(*key)
        return self._engines[key].rows(unit, self.vectors[unit.vector, unit.site].values)

    def costs(self) -> list[Cost]:
        """What the units take, teacher-forced and generated."""
        n_layers = self.checkpoints.base.model.config.num_hidden_layers
        n_moving = len(self.asked.lambdas) - 1
        pair_tokens = sum(_tokens_of(pair) for pair in self.halves.test)
        prompts = self.halves.test[: self.asked.n_generated]
        prompt_tokens = sum(len(pair.ids.prompt_ids) for pair in prompts)
        new_tokens = len(prompts) * len(self.asked.lambdas) * self.asked.decoding.max_new_tokens
        goals = len(get_args(Direction))
        depths = [min(site_depth(u.site, n_layers), n_layers - 1) for u in self.units if u.kind == "teacher_forced"]
        passes = goals + sum(sweep_cost(n_layers, depth, n_moving) for depth in depths)
        costs = [Cost("teacher-forced", passes, round(passes * pair_tokens))]
        if n := len(self.units) - len(depths):
            costs.append(
                Cost(
                    "generated, at most",
                    float(n * self.asked.decoding.max_new_tokens),
                    n * (prompt_tokens + new_tokens),
                )
            )
        return costs

    def _engine(self, direction: Direction, kind: Kind) -> TeacherForcedSweep | GenerationSweep:
        asked, models = self.asked, (self.checkpoints.base, self.checkpoints.aligned)
        start, goal = models if direction == "interpolation" else models[::-1]
        if kind == "teacher_forced":
            return TeacherForcedSweep(start, goal, self.halves.test, direction=direction, strengths=asked.lambdas)
        return GenerationSweep(
            start,
            self.halves.test,
            scorers=asked.scorers,
            decoding=asked.decoding,
            n_prompts=asked.n_generated,
            sign=1 if direction == "interpolation" else -1,
            strengths=asked.lambdas,
        )


def default_sites(n_layers: int) -> tuple[str, ...]:
    """After the middle block, and before and after the final norm.

    >>> default_sites(4)
    ('layer_01', 'final_pre_norm', 'final_post_norm')
    """
    middle = (layer_site((n_layers - 1) // 2),) if n_layers > 1 else ()
    return (*middle, FINAL_PRE_NORM, FINAL_POST_NORM)


def _tokens_of(pair: ProbePair) -> int:
    """Tokens of the two rows of a pair, the prompt in both."""
    return 2 * len(pair.ids.prompt_ids) + len(pair.ids.chosen_ids) + len(pair.ids.rejected_ids)


def _pairs_fingerprint(pairs: Sequence[ProbePair]) -> str:
    text = repr([(pair.pair_id, *map(list, pair.ids)) for pair in pairs])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
