"""Design of a study before it is run: seeds and prompts at which each comparison of a pilot would be decided."""

import math
from collections.abc import Callable, Sequence

import pandas as pd
from scipy.special import ndtri, stdtrit
from scipy.stats import nct

from analysis.claims.claim import OWN
from analysis.claims.evidence import Arms, evidence_of
from analysis.claims.verdict import LEAST_SEEDS, LEVEL, Check, Verdict
from tiltmeter.stats.arms import Arm
from tiltmeter.stats.jackknife import jackknife_variance

POWER = 0.9
MOST_SEEDS = 200
MOST_PROMPTS = 1_000_000
COLUMNS = (
    "claim",
    "against",
    "effect",
    "spread_of_seeds",
    "error_of_prompts",
    "seeds",
    "prompts",
    "seeds_there",
    "prompts_there",
)


def plan_table(verdicts: Sequence[Verdict], arms: Arms) -> pd.DataFrame:
    """Seeds and prompts at which a comparison as large as the pilot's is decided in nine of ten studies, a row each.

    ``against``: the threshold (two-sided, 95 %), or a control (two-sided, 5 % over the number of controls, as Holm's first step).
    NaN in ``seeds`` or ``prompts``: not known from the pilot; infinity: no number of them would do.

    Args:
        verdicts: of the pilot; only claims whose T is known have rows.
        arms: that they were judged by.
    """
    rows = []
    for verdict in verdicts:
        evidence = evidence_of(verdict.claim, arms)
        if isinstance(evidence.own, str):
            continue
        effect = abs(evidence.own.mean - verdict.claim.bound.value)
        rows.append(_row(verdict, "threshold", effect, [evidence.own], tail=LEVEL / 2))
        controls = [check for check in verdict.checks if check.kind == "beats" and check.passed is not None]
        for check in controls:
            control = evidence.beats[check.name]
            assert isinstance(control, Arm)
            pair = [evidence.own, control]
            if check.name in OWN:  # of the same runs: one sample of differences
                pair = [Arm(evidence.own.values - control.values)]
            rows.append(_row(verdict, check.name, _effect(check), pair, tail=LEVEL / 2 / len(controls)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def seeds_needed(effect: float, spread: float, *, tail: float, n_arms: int = 1, power: float = POWER) -> float:
    """Runs an arm at which Student's test finds an effect with the asked power; infinite above 200.

    Args:
        effect: true difference.
        spread: standard deviation of a run, or of the difference of two runs for two arms.
        tail: error rate on the side of the effect.
        n_arms: 1 for a mean against a number, 2 for two arms of as many runs each.

    >>> seeds_needed(1.0, 1.0, tail=0.025), seeds_needed(10.0, 1.0, tail=0.025)
    (13.0, 3.0)
    """
    if not (effect > 0 and spread > 0):
        return float(LEAST_SEEDS) if effect > 0 and spread == 0 else math.inf if effect == 0 else math.nan

    def found(n: int) -> bool:
        freedom = float(n_arms * (n - 1))
        return bool(nct.sf(stdtrit(freedom, 1 - tail), freedom, effect * math.sqrt(n) / spread) >= power)

    return _smallest(found, LEAST_SEEDS, MOST_SEEDS)


def prompts_needed(effect: float, error: float, n_prompts: int, *, tail: float, power: float = POWER) -> float:
    """Prompts at which an effect is found with the asked power, the error falling with the root of their number.

    Args:
        error: standard error over the pilot's ``n_prompts``.

    >>> prompts_needed(1.0, 0.5, 100, tail=0.025)  # (1.96 + 1.28)² · .25 · 100
    263.0
    """
    if not n_prompts or error != error:
        return math.nan
    if effect <= 0:
        return math.inf
    return float(math.ceil(max(2.0, n_prompts * (error * float(ndtri(1 - tail) + ndtri(power)) / effect) ** 2)))


def _row(verdict: Verdict, against: str, effect: float, arms: Sequence[Arm], *, tail: float) -> dict[str, object]:
    known = [float(arm.values[0].std()) for arm in arms if arm.n_runs > 1]
    spreads = [float(arm.values[0].std()) if arm.n_runs > 1 else (known[0] if known else math.nan) for arm in arms]
    values = arms[0].values.mean(1) - (arms[1].values.mean(1) if len(arms) > 1 else 0.0)
    n_prompts = len(values) - 1
    error = math.sqrt(float(jackknife_variance(values[1:]))) if n_prompts > 1 else math.nan
    spread = math.sqrt(sum(x**2 for x in spreads))
    seeds = seeds_needed(effect, spread, tail=tail, n_arms=len(arms))
    if (
        arms[-1].is_population and arms[-1].n_runs > 1
    ):  # a further draw has to be passed: more runs of dpo don't help against it
        reach = float(stdtrit(arms[-1].n_runs - 1.0, 1 - tail)) * spreads[-1] * math.sqrt(1 + 1 / arms[-1].n_runs)
        seeds = seeds_needed(effect - reach, spreads[0], tail=tail) if effect > reach else math.inf
    return {
        "claim": verdict.claim.key, "against": against, "effect": effect, "spread_of_seeds": spread, "error_of_prompts": error,
        "seeds": seeds, "prompts": prompts_needed(effect, error, n_prompts, tail=tail) if n_prompts > 1 else math.nan,
        "seeds_there": arms[0].n_runs, "prompts_there": n_prompts,
    }  # fmt: skip


def _effect(check: Check) -> float:
    """Difference in the direction of the claim; 0 where the pilot has none."""
    return max(check.interval.value, 0.0)


def _smallest(found: Callable[[int], bool], least: int, most: int) -> float:
    """The smallest number for which a rising condition holds; infinite where none does."""
    if not found(most):
        return math.inf
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if found(middle) else (middle + 1, most)
    return float(least)
