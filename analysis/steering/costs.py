"""What a sweep will take, before it is run."""

from typing import get_args

from analysis.contract import Cost
from analysis.steering.sweep import Sweep
from analysis.steering.table import Unit
from tiltmeter.models.layers import site_depth
from tiltmeter.steering.recovery import Direction
from tiltmeter.steering.sweep_logits import sweep_cost


def sweep_costs(sweep: Sweep) -> list[Cost]:
    """What the units of a sweep take, teacher-forced and generated."""
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
    """How many vectors and strengths other than 0 a unit takes."""
    if unit.part == "choosing":
        return 1
    drawn = sweep.made.drawn.get((unit.vector, unit.site))
    if drawn is None:
        return len(sweep.asked.lambdas) - 1
    return len(drawn) * (len(sweep.random_strengths(unit.site)) - 1)
