"""Evidence for claims: T of every arm, control and condition, of the hidden states and tables of a study's runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.claims.claim import DRAWN, OWN, Asked, Claim, OfTable
from analysis.claims.statistics import Missing, Read, Statistic
from analysis.claims.verdict import Evidence, Verdict, judge
from analysis.open.studies import DPO
from tiltmeter.stats.arms import Arm
from tiltmeter.stats.jackknife import without_each


class Figure(NamedTuple):
    """A number of one run's table."""

    value: float
    error: float = math.nan
    """Standard error over prompts, from the table's own interval; NaN: the table has none."""


class HeldOut(NamedTuple):
    """Losses of the same held-out pairs in each run of an arm."""

    losses: Float[Tensor, "pair run"]
    clusters: Sequence[str]
    """Prompt of each pair."""
    at_start: float
    """Loss of every pair before training."""


@dataclass(frozen=True)
class Arms:
    """A study as claims see it.

    Args:
        reads: arm → hidden states of each of its runs or draws, all of the same prompts.
        tables: arm and table → value in each run's report; text: why there is none.
        missing: arm → what would make it, for those that are not there.
        noise_ratio: mean ‖δ‖ of the dpo runs over the noise floor; NaN: not measured.
        noise_missing: why it was not.
        losses: arm → losses of the held-out pairs in each of its runs; text: why they aren't known.
        kl: arm → KL(π ‖ π₀) of each of its runs, nats a token of the chosen responses of the probe.
    """

    reads: Mapping[str, Sequence[Read]]
    tables: Callable[[str, OfTable], Sequence[Figure] | str] = lambda arm, asked: "no report has it"
    missing: Mapping[str, str] = field(default_factory=dict)
    noise_ratio: float = float("inf")
    noise_missing: str = ""
    kl: Mapping[str, Sequence[float]] = field(default_factory=dict)
    losses: Callable[[str], HeldOut | str] = lambda arm: "no run kept its held-out losses"
    _kept: dict[tuple[str, Statistic], Arm | str] = field(default_factory=dict, repr=False)

    def arm(self, name: str, statistic: Asked | None) -> Arm | str:
        """T in the runs of an arm; text: why it is not known."""
        return "nothing computes it yet" if statistic is None else statistic.of_arm(name, self)

    def of_table(self, name: str, asked: OfTable) -> Arm | str:
        """T of a table in each run's report; text: why it is not known."""
        found = self.tables(name, asked)
        if isinstance(found, str):
            return found
        values = torch.tensor([[figure.value for figure in found]], dtype=torch.float64)
        errors = [figure.error for figure in found if figure.error == figure.error]
        return Arm(values, error_of_prompts=sum(errors) / len(errors) if errors else 0.0)

    def of_losses(self, name: str) -> Arm | str:
        """Share of what dpo gains in held-out loss that each run of an arm gains; text: why it is not known."""
        own, whole = self.losses(name), self.losses(DPO)
        if isinstance(own, str) or isinstance(whole, str):
            return own if isinstance(own, str) else str(whole)
        weights = without_each(own.clusters)
        gained, most = ((weights @ (one.at_start - one.losses)) / weights.sum(1, keepdim=True) for one in (own, whole))
        return Arm(gained / most.mean(1, keepdim=True))

    def of_states(self, name: str, statistic: Statistic) -> Arm | str:
        """T of the hidden states of each run, computed once; text: why it is not known."""
        key = name, statistic
        if key not in self._kept:
            self._kept[key] = self._values(name, statistic)
        return self._kept[key]

    def _values(self, name: str, statistic: Statistic) -> Arm | str:
        reads = self.reads.get(name, ())
        if not reads:
            return self.missing.get(name, "no run of it")
        try:
            values = torch.stack([statistic.of(read) for read in reads], dim=1)
        except Missing as error:
            return str(error)
        return Arm(values, is_population=name in DRAWN)


def evidence_of(claim: Claim, arms: Arms) -> Evidence:
    """Everything that the verdict on one claim is told of."""
    beats = {name: arms.arm(claim.arm if name in OWN else name, statistic) for name, statistic in claim.beats.items()}
    survives = {asked.name: arms.arm(claim.arm, asked.statistic) for asked in claim.survives}
    return Evidence(arms.arm(claim.arm, claim.statistic), beats, survives, arms.noise_ratio, arms.noise_missing)


def judge_all(claims: Sequence[Claim], arms: Arms) -> list[Verdict]:
    """Verdicts on all claims, in their order."""
    return [judge(claim, evidence_of(claim, arms)) for claim in claims]
