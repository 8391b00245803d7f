"""Scorers for runs in which the scorer is not the point."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.processes import HANGS
from tiltmeter.scoring.scorer import Sample, Scores, mean_figure


@dataclass
class Lengths:
    """Characters of each completion, and everything that it was shown."""

    name: str = "lengths"
    is_slow: bool = False
    seen: list[list[Sample]] = field(default_factory=list)
    n_starts: int = 0

    def start(self) -> None:
        self.n_starts += 1

    def score(self, samples: Sequence[Sample]) -> Scores:
        self.seen.append(list(samples))
        columns = {
            "characters/policy": [float(len(sample.policy.text)) for sample in samples],
            "characters/base": [float(len(sample.base.text)) for sample in samples],
        }
        figures = [
            mean_figure("characters", of, columns[f"characters/{of}"], samples, scorer=self.name)
            for of in ("policy", "base")
        ]
        return Scores(figures, columns)


class Fails(Lengths):
    """Raises what no scorer should."""

    def score(self, samples: Sequence[Sample]) -> Scores:
        raise KeyError("out of order")


class Missing(Lengths):
    """Finds nothing to score."""

    def score(self, samples: Sequence[Sample]) -> Scores:
        column = [float("nan")] * len(samples)
        return Scores([mean_figure("missing", "policy", column, samples, scorer=self.name)], {"missing": column})


@dataclass
class Held(Lengths):
    """A slow scorer that answers when it is let."""

    is_slow: bool = True
    go: threading.Event = field(default_factory=threading.Event)

    def score(self, samples: Sequence[Sample]) -> Scores:
        assert self.go.wait(HANGS)
        return super().score(samples)
