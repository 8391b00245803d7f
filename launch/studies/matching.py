"""Control arms that go as far from the base as DPO: the learning rate is set so that the KL is the same (CLAIMS.md §2, C3)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from analysis.claims.readings import kl_from_base
from analysis.open.checkpoints import checkpoints_of_run
from analysis.open.runs import is_finished, open_run
from analysis.open.studies import DPO, runs_in
from datamodules.splits import matching_pairs
from launch.parts import build_parts
from launch.screen import console
from launch.studies.study_file import Arm, state_of
from tiltmeter.pairs.batch import TokenizedPair

BROKE_OFF = 4
"""Exit code of a training that broke off for its numbers."""
WITHIN = 0.2
"""Share by which the KL may differ from DPO's."""
_MOST = 30.0
"""Largest factor between one learning rate and the next."""


class Ended(NamedTuple):
    """End of a process that trained: its exit code, the line it ended with, and its minutes."""

    code: int
    error: str
    minutes: float


class Try(NamedTuple):
    """A learning rate and how far it went."""

    learning_rate: float
    kl: float
    """KL(π ‖ π₀), nats a token; infinity: training broke off."""


def is_matched(kl: float, target: float) -> bool:
    """Whether a KL is the target's, within :data:`WITHIN`."""
    return abs(kl - target) <= WITHIN * target


def nearest(tries: Sequence[Try], target: float) -> Try:
    """The try whose KL is nearest to the target, by their ratio."""
    return min(tries, key=lambda one: abs(math.log(max(one.kl, 1e-12) / target)))


def next_rate(tries: Sequence[Try], target: float, *, first: float) -> float:
    """Learning rate to try next: between the nearest ones below and above, by logarithms; beyond all, KL grows with its square.

    Args:
        tries: so far.
        target: KL to reach, nats a token.
        first: where nothing was tried yet.

    >>> next_rate([], 0.4, first=1e-4), next_rate([Try(1e-4, 0.1)], 0.4, first=1e-4)
    (0.0001, 0.0002)
    >>> round(next_rate([Try(1e-4, 0.1), Try(1e-3, math.inf)], 0.4, first=1e-4), 6)
    0.000316
    """
    below = max((one for one in tries if one.kl < target), default=None)
    above = min((one for one in tries if one.kl >= target), default=None)
    if below is None or above is None:
        known = below or above
        if known is None:
            return first
        factor = math.sqrt(target / max(known.kl, 1e-12))
        return known.learning_rate * min(max(factor, 1 / _MOST), _MOST)
    share = 0.5
    if above.kl < math.inf and below.kl > 0:
        share = math.log(target / below.kl) / math.log(above.kl / below.kl)
    share = min(max(share, 0.1), 0.9)
    return float(below.learning_rate * (above.learning_rate / below.learning_rate) ** share)


def pairs_to_match(config: DictConfig) -> Sequence[TokenizedPair]:
    """Held-out pairs on which distances from the base are measured: no probe's, and never trained on."""
    return matching_pairs(build_parts(config).data.splits["val"].pairs)


def kl_of_run(folder: Path, pairs: Sequence[TokenizedPair]) -> float:
    """KL(π ‖ π₀) of a finished run on given pairs, nats a token of the chosen responses; infinity where it is no number."""
    opened = checkpoints_of_run(open_run(folder))
    kl = kl_from_base(opened.base.model, opened.aligned.model, pairs)
    return kl if math.isfinite(kl) else math.inf


class Matching:
    """Trains arms whose learning rate is set so that they go as far from the base as dpo; each try is a run of its own.

    Args:
        folder: of the study.
        config: of its runs, as far as they have it in common.
        tries: runs so far, as study.yaml has them: arm, seed, run, learning_rate and kl; grows.
        start: trains a run at a learning rate.
        write: writes study.yaml.
    """

    def __init__(
        self,
        folder: Path,
        config: DictConfig,
        tries: list[dict[str, Any]],
        start: Callable[[Arm, float], Ended],
        write: Callable[[], None],
    ) -> None:
        self._folder, self._tries, self._start, self._write = folder, tries, start, write
        self._first, self._most = float(config.module.learning_rate), int(config.study.kl_tries)
        self._pairs = pairs_to_match(config)

    def train(self, run: Arm, runs: Sequence[Arm]) -> Arm:
        """The try whose KL is nearest to the mean of the dpo runs that are there, once one is near enough or all are made.

        Args:
            runs: of the study, as far as it is.
        """
        done = [one.run for one in runs if one.arm == DPO and one.state == "finished"]
        if not done:
            return replace(run, state="failed", error=f"no run of {DPO} whose KL it could be matched to")
        target = sum(self._kl_of(name) for name in done) / len(done)
        self._take_up(run)
        while True:
            tries = [Try(one["learning_rate"], one["kl"]) for one in self._own(run)]
            best = nearest(tries, target) if tries else None
            if best is not None and (is_matched(best.kl, target) or len(tries) >= self._most):
                break
            rate = float(f"{next_rate(tries, target, first=self._first):.4g}")
            console().print(_said(tries, rate, target), soft_wrap=True)
            ended = self._start(run, rate)
            if not self._take_up(run):
                if ended.code != BROKE_OFF:
                    return replace(run, state="failed", error=ended.error)
                self._keep(run, "", rate, math.inf)
        found = next(one for one in self._own(run) if one["kl"] == best.kl)
        if not found["run"]:
            return replace(run, state="failed", error=f"training broke off at every learning rate tried ({len(tries)})")
        _, name, minutes = state_of(self._folder.parent / found["run"])
        return replace(run, state="finished", run=name, minutes=minutes, kl=(best.kl, target))

    def _own(self, run: Arm) -> list[dict[str, Any]]:
        return [one for one in self._tries if (one["arm"], one["seed"]) == (run.arm, run.seed)]

    def _take_up(self, run: Arm) -> bool:
        """Measure finished tries that weren't yet; False: there are none."""
        known = {one["run"] for one in self._own(run)}
        found = False
        for folder, config in runs_in(self._folder):
            is_own = (config["arm"], config["seed"]) == (run.arm, run.seed) and folder.name not in known
            if is_own and is_finished(folder):
                self._keep(run, folder.name, float(config["module"]["learning_rate"]), self._kl_of(folder.name))
                found = True
        return found

    def _keep(self, run: Arm, name: str, learning_rate: float, kl: float) -> None:
        self._tries.append({"arm": run.arm, "seed": run.seed, "run": name, "learning_rate": learning_rate, "kl": kl})
        self._write()

    def _kl_of(self, name: str) -> float:
        return kl_of_run(self._folder.parent / name, self._pairs)


def _said(tries: Sequence[Try], rate: float, target: float) -> str:
    """A line on the next try."""
    before = "; ".join(f"{one.kl:.3g} at {one.learning_rate:.3g}" for one in tries)
    so_far = f" (so far {before})" if before else ""
    return f"Learning rate {rate:.3g}, try {len(tries) + 1}: KL from the base is to be {target:.3g}, as dpo’s{so_far}"
