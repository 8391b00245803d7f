"""The protocol of scorers of generated text: samples in; named figures with intervals and a column a figure out.

A score that could not be taken is missing (NaN), counted, and never a number. One that compares replies is a judge, and is itself
held against people's labels (:class:`Agreement`) before any of its figures is shown.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from tiltmeter.errors import UserError, argument
from tiltmeter.models.generation import Completion
from tiltmeter.stats.jackknife import NO_INTERVAL, cluster_mean_interval
from tiltmeter.stats.proportions import share_interval

Side = Literal["policy", "base", "both", "judge"]
MAX_MISSING_SHARE = 0.05
"""Above this share of missing scores a figure is NaN: what is left may not be a fair sample."""
AGREEMENT = "judge/agreement"
"""Name of the share of people's preferences that a judge shares."""
AGREEMENT_PAIRS = 100
"""Held-out pairs that a judge is held against."""


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with what both models said to it, under the same decoding and random numbers."""

    pair_id: str
    prompt: str
    """Exact text."""
    chosen: str
    """The preferred response of the data set."""
    base: Completion
    policy: Completion
    group: str
    """Samples of equal group (prompt) are not independent: intervals are over groups."""
    index: int = 0
    """Number of the completion of the prompt, from 0."""
    attributes: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """Attributes that the source knows of the pair, such as the situation of the synthetic world."""


class LabelledPair(NamedTuple):
    """Two replies to a held-out prompt, of which people preferred one."""

    pair_id: str
    prompt: str
    chosen: str
    rejected: str
    group: str
    """Pairs of equal group have one prompt."""
    attributes: Mapping[str, str | int | float | bool] = {}


class Figure(NamedTuple):
    """One number about all samples."""

    name: str
    """Behind ``behaviour/``, for example ``toxicity`` or ``geval_win_rate``; the judge's own begin with ``judge/``."""
    of: Side
    """Whose: the policy's, the base model's, of the two together (a win rate), or the judge's (its agreement with people)."""
    value: float
    """NaN: too much is missing, or there is nothing to score."""
    low: float
    high: float
    """95 % interval over prompts; NaN where there is none."""
    n: int
    """Samples scored."""
    n_missing: int
    """Samples that could not be scored."""
    scorer: str
    """Scorer that produced it, with everything that changes its numbers: model, revision, mode, signature."""


@dataclass(frozen=True)
class Scores:
    """A scorer's figures of samples, and its values of each."""

    figures: list[Figure] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=dict)
    """A value a sample, in their order, for tables; NaN: missing. ``toxicity/policy``, ``toxicity/base``, ``geval_win`` …"""


@runtime_checkable
class Scorer(Protocol):
    """A scorer of samples. One that can't reach what it needs says so in :meth:`start`, before anything expensive."""

    @property
    def name(self) -> str:
        """Scorer and version, as in :attr:`Figure.scorer`."""
        ...

    @property
    def is_slow(self) -> bool:
        """Whether it waits for something outside this process; then it is asked beside training, not in its way."""
        ...

    def start(self) -> None:
        """Load or reach what is needed. Raises UserError: a missing file, model, key or address, in one line."""
        ...

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Score samples; a single failure is a missing value, not an exception."""
        ...


class Agreement:
    """Share of people's preferences that a judge shares: measured before its first score, then said with every one.

    Args:
        n_pairs: held-out pairs that it is asked about; 0: none, and the agreement is not known.
        measure: asks the judge, in the way that it is asked about replies; figures ``judge/…`` of ``judge``.
        start: loads or reaches the judge, for this alone.

    Raises:
        UserError: a number below 0.
    """

    def __init__(
        self, n_pairs: int, measure: Callable[[Sequence[LabelledPair]], list[Figure]], start: Callable[[], None]
    ) -> None:
        if n_pairs < 0:
            raise UserError(
                f"{argument('JudgeScorer.agreement_pairs')}: expected a number of pairs from 0, got {n_pairs}"
            )
        self.n_pairs, self.start, self._measure = n_pairs, start, measure
        self._pairs: list[LabelledPair] = []
        self._found: list[Figure] = []

    def use_labels(self, pairs: Sequence[LabelledPair]) -> None:
        """Take the first pairs, so many as it is asked about."""
        self._pairs, self._found = list(pairs)[: self.n_pairs], []

    def figures(self) -> list[Figure]:
        """Figures of the judge; asked for once, and again where too many answers were missing."""
        if self._pairs and (not self._found or any(f.name == AGREEMENT and math.isnan(f.value) for f in self._found)):
            self._found = self._measure(self._pairs)
        return list(self._found)


@runtime_checkable
class OfAWorld(Protocol):
    """A scorer that knows the truth about one source of data."""

    def use_world(self, world: object) -> None:
        """Take the source that samples are from."""
        ...


@runtime_checkable
class HeldAgainstLabels(Protocol):
    """A scorer that compares replies, and is compared with people itself."""

    def use_labels(self, pairs: Sequence[LabelledPair]) -> None:
        """Take held-out pairs that people ranked."""
        ...


def start_scorers(scorers: Iterable[Scorer], *, world: object, pairs: Sequence[LabelledPair]) -> None:
    """Give scorers what they go by, and let them load or reach what they need.

    Args:
        world: the source that samples are from.
        pairs: held out, that judges are held against.

    Raises:
        UserError: the scorers'.
    """
    for scorer in scorers:
        if isinstance(scorer, OfAWorld):
            scorer.use_world(world)
        if isinstance(scorer, HeldAgainstLabels):
            scorer.use_labels(pairs)
        scorer.start()


def mean_figure(
    name: str,
    of: Side,
    values: Sequence[float],
    samples: Sequence[Sample],
    *,
    scorer: str,
    is_share: bool = False,
    max_missing: float | None = None,
) -> Figure:
    """Mean over the samples that have a score (not NaN), with a 95 % interval over prompts.

    Args:
        values: one a sample.
        is_share: whether values lie in 0 … 1 (yes or no, a tie as half, a probability): :func:`share_interval` is then the
            interval, else :func:`cluster_mean_interval`.
        max_missing: share of missing scores above which the figure is NaN; None: :data:`MAX_MISSING_SHARE`.

    >>> mean_figure("toxicity", "policy", [math.nan], [Sample("a", "", "", *[Completion("", 0, False)] * 2, "a")], scorer="x").value
    nan
    """
    groups = [sample.group for sample in samples]
    return grouped_mean_figure(name, of, values, groups, scorer=scorer, is_share=is_share, max_missing=max_missing)


def grouped_mean_figure(
    name: str,
    of: Side,
    values: Sequence[float],
    groups: Sequence[str],
    *,
    scorer: str,
    is_share: bool = False,
    max_missing: float | None = None,
) -> Figure:
    """:func:`mean_figure` of values that come with the name of their group alone: pairs, or questions of a benchmark."""
    limit = MAX_MISSING_SHARE if max_missing is None else max_missing
    scored = [(value, group) for value, group in zip(values, groups, strict=True) if not math.isnan(value)]
    n_missing = len(values) - len(scored)
    if not scored or n_missing > limit * len(values):
        return Figure(name, of, *NO_INTERVAL, len(scored), n_missing, scorer)
    interval_of = share_interval if is_share else cluster_mean_interval
    interval = interval_of([value for value, _ in scored], [group for _, group in scored])
    return Figure(name, of, *interval, len(scored), n_missing, scorer)


def as_metrics(figures: Sequence[Figure]) -> dict[str, float]:
    """Figures under the names of logs: ``behaviour/NAME``, ``behaviour/NAME/base`` for the base model's; a judge's own as they are.

    >>> as_metrics([Figure("bleu", "base", 1.0, 0.0, 2.0, 9, 0, "x"), Figure(AGREEMENT, "judge", 0.75, 0.5, 0.9, 40, 0, "y")])
    {'behaviour/bleu/base': 1.0, 'judge/agreement': 0.75}
    """
    ends = {"base": "/base"}
    return {("" if f.of == "judge" else "behaviour/") + f.name + ends.get(f.of, ""): f.value for f in figures}


_kept: ContextVar[list[str] | None] = ContextVar("kept", default=None)


def notice(text: str) -> None:
    """Warn now; inside :func:`kept_notices`, let whoever opened it do so."""
    if (kept := _kept.get()) is None:
        warnings.warn(text, stacklevel=3)
    else:
        kept.append(text)


@contextmanager
def kept_notices() -> Iterator[list[str]]:
    """Keep what this thread has to say, for another one that logs it: library code there may just be ignoring all warnings."""
    kept: list[str] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)
