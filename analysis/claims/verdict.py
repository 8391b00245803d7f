"""From the figures of arms and controls to a verdict with a known error rate (CLAIMS.md §6).

    inconclusive                        something is missing, the update is within the noise floor, or T's interval straddles τ
    refuted                             T's interval lies wholly on the wrong side of τ
    not distinguishable from control    T passes, but not what it must beat (Holm over controls, 5 %), or not where it must survive
    supported                           passes τ, beats all, survives all

benchmarks/verdicts.py measures how often each is wrong, in worlds where the truth is planted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from analysis.claims.claim import OWN, Claim, Survival
from tiltmeter.stats.arms import Arm, Difference, arm_difference, arm_interval
from tiltmeter.stats.jackknife import NO_INTERVAL, Interval
from tiltmeter.stats.multiplicity import holm

Kind = Literal["supported", "not distinguishable from control", "refuted", "inconclusive"]
SUPPORTED, SAME, REFUTED, INCONCLUSIVE = get_args(Kind)
LEAST_SEEDS = 3
LEAST_DRAWS = 5
LEVEL = 0.05
NOISE_MULTIPLE = 3.0
"""‖δ‖ has to be this many times the noise floor (control C1)."""


@dataclass(frozen=True)
class Check:
    """Outcome of one control that must be beaten, or of one condition that must be survived.

    Args:
        name: arm, control or condition.
        kind: ``beats`` or ``survives``.
        value: T there.
        interval: of T less that of the control, in the claim's direction; of what must be survived, of T itself.
        p: adjusted two-sided p-value; NaN for what must be survived.
        n_runs: runs or draws behind it.
        passed: None where it is missing.
        missing: what is not there, and how to get it.
    """

    name: str
    kind: Literal["beats", "survives"]
    value: float = math.nan
    interval: Interval = NO_INTERVAL
    p: float = math.nan
    n_runs: int = 0
    passed: bool | None = None
    missing: str = ""


@dataclass(frozen=True)
class Verdict:
    """Verdict on one claim, and the one sentence that decides."""

    claim: Claim
    kind: Kind
    sentence: str
    value: Interval
    """T with its interval, over seeds and prompts, the wider of the two."""
    n_runs: int
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """Figures of one claim: of the arm that it is about, of each control, and under each condition.

    Args:
        own: T of the runs of the claim's arm; text: why there is none.
        beats: control → its T, or why there is none.
        survives: condition → T of the same runs there, or why there is none.
        noise_ratio: ‖δ‖ over the noise floor; NaN: not measured, text in ``noise_missing``.
    """

    own: Arm | str
    beats: Mapping[str, Arm | str] = field(default_factory=dict)
    survives: Mapping[str, Arm | str] = field(default_factory=dict)
    noise_ratio: float = math.inf
    noise_missing: str = ""


def judge(claim: Claim, evidence: Evidence) -> Verdict:
    """The verdict on a claim."""
    own = evidence.own
    if isinstance(own, str):
        return Verdict(claim, INCONCLUSIVE, f"T is not known: {own}.", NO_INTERVAL, 0)
    value = arm_interval(own)
    checks = (*_beaten(claim, own, evidence), *_survived(claim, evidence))

    def verdict(kind: Kind, sentence: str) -> Verdict:
        return Verdict(claim, kind, sentence, value, own.n_runs, checks)

    missing = _missing(claim, own, evidence, checks)
    if missing:
        return verdict(INCONCLUSIVE, f"Not judged: {'; '.join(missing)}.")
    said = f"T = {value.value:.3g} ({value.low:.3g} … {value.high:.3g})"
    holds = [claim.bound.holds(end) for end in (value.low, value.high)]
    if not any(holds):
        return verdict(REFUTED, f"{said}, against a threshold of {claim.bound}.")
    if not all(holds):
        return verdict(INCONCLUSIVE, f"{said} straddles the threshold of {claim.bound}.")
    lost = [check for check in checks if not check.passed]
    if lost:
        return verdict(SAME, f"{said} passes {claim.bound}, but {_why(lost[0])}.")
    beaten = ", ".join(check.name for check in checks if check.kind == "beats") or "no control"
    return verdict(SUPPORTED, f"{said} passes {claim.bound}, beats {beaten}, and holds wherever it must.")


def _missing(claim: Claim, own: Arm, evidence: Evidence, checks: tuple[Check, ...]) -> list[str]:
    found = [] if own.n_runs >= LEAST_SEEDS else [f"{own.n_runs} of {LEAST_SEEDS} seeds of {claim.arm}"]
    found += [f"{check.name} ({check.missing})" for check in checks if check.passed is None]
    if math.isnan(evidence.noise_ratio):
        found.append(f"noise floor ({evidence.noise_missing})")
    elif evidence.noise_ratio < NOISE_MULTIPLE:
        found.append(f"the update is {evidence.noise_ratio:.2g} times the noise floor, expected {NOISE_MULTIPLE:g}")
    return found


def _beaten(claim: Claim, own: Arm, evidence: Evidence) -> list[Check]:
    """Every control that must be beaten; p-values are adjusted over those that are there."""
    there: dict[str, Difference] = {}
    found: dict[str, Check] = {}
    for name in claim.beats:
        control = evidence.beats.get(name, "not read")
        why = control if isinstance(control, str) else _too_few(control, own)
        if why or isinstance(control, str):
            found[name] = Check(name, "beats", missing=why)
        else:
            there[name] = arm_difference(*_directed(claim, own, control), paired=name in OWN)
            found[name] = Check(name, "beats", control.mean, there[name].interval, n_runs=control.n_runs)
    # two-sided, as the intervals beside them are
    two_sided = [min(1.0, 2 * difference.p_greater) for difference in there.values()]
    for name, p in zip(there, holm(two_sided), strict=True):
        check = found[name]
        found[name] = Check(name, "beats", check.value, check.interval, p, check.n_runs, passed=p <= LEVEL)
    return list(found.values())


def _too_few(control: Arm, own: Arm) -> str:
    if control.is_population and control.n_runs < LEAST_DRAWS:
        return f"{control.n_runs} draws, expected {LEAST_DRAWS}"
    return "" if own.n_runs > 1 or control.n_runs > 1 else "one run each, of which no spread can be told"


def _directed(claim: Claim, own: Arm, control: Arm) -> tuple[Arm, Arm]:
    """Both arms with a sign under which more is more of the claim."""
    if claim.bound.is_lower:
        return own, control
    return own._replace(values=-own.values), control._replace(values=-control.values)


def _survived(claim: Claim, evidence: Evidence) -> list[Check]:
    return [_survival(survival, evidence.survives.get(survival.name, "not read")) for survival in claim.survives]


def _survival(asked: Survival, found: Arm | str) -> Check:
    if isinstance(found, str):
        return Check(asked.name, "survives", missing=found)
    interval = arm_interval(found)
    passed = asked.bound.holds(interval.value)
    return Check(asked.name, "survives", interval.value, interval, n_runs=found.n_runs, passed=passed)


def _why(check: Check) -> str:
    if check.kind == "survives":
        return f"under {check.name} it is {check.value:.3g}"
    low, high = check.interval.low, check.interval.high
    return (
        f"{check.name} has {check.value:.3g}, a difference of {check.interval.value:.2g} ({low:.2g} … {high:.2g}; adjusted "
        f"p = {check.p:.2g})"
    )
