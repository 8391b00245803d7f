"""What a sweep will take, before it is run."""

from typing import get_args

from analysis.costs import Cost
from analysis.steering_sweep import Sweep
from tiltmeter.layers import site_depth
from tiltmeter.recovery import Direction
from tiltmeter.sweeping import sweep_cost


def sweep_costs(sweep: Sweep) -> list[Cost]:
    """What the units of a sweep take, teacher-forced and generated."""
    asked, n_layers = sweep.asked, sweep.checkpoints.base.model.config.num_hidden_layers
    costs = []
    moved = {"choosing": (sweep.choosing, 1), "teacher_forced": (sweep.halves.test, len(asked.lambdas) - 1)}
    for part, (pairs, n_moving) in moved.items():
        depths = [min(site_depth(u.site, n_layers), n_layers - 1) for u in sweep.units if u.part == part]
        passes = len(get_args(Direction)) + sum(sweep_cost(n_layers, depth, n_moving) for depth in depths)
        costs.append(Cost(part.replace("_", "-"), passes, round(passes * sum(pair.n_row_tokens for pair in pairs))))
    if n := sum(unit.part == "generated" for unit in sweep.units):
        prompts = sweep.halves.test[: asked.n_generated]
        prompt_tokens = sum(len(pair.ids.prompt_ids) for pair in prompts)
        new_tokens = len(prompts) * len(asked.lambdas) * asked.decoding.max_new_tokens
        steps = float(n * asked.decoding.max_new_tokens)
        costs.append(Cost("generated, at most", steps, n * (prompt_tokens + new_tokens)))
    return costs
