"""Several sources in fixed shares, none of their pairs used twice."""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

from datamodules.records import LoadReport, PreferencePair, PreferenceSource
from tiltmeter.errors import UserError
from tiltmeter.plain_text import did_you_mean


class Mixture:
    """A seeded draw from several sources, interleaved; every pair keeps its own source.

    With weights w_i (divided by their sum) the mixture has n_i = floor(w_i N) pairs of source i, where N is the largest
    number for which no source has to give more pairs than it has.

    Args:
        sources: Sources by a name of your choice.
        weights: Each source's share of the pairs, under the same names; need not sum to one. A source of weight 0 is
            not read.
        seed: Chooses which pairs of the larger sources are used.

    Raises:
        UserError: No sources, names that differ, or weights that are negative, not finite or all zero.
    """

    name = "mixture"

    def __init__(self, sources: Mapping[str, PreferenceSource], weights: Mapping[str, float], seed: int = 0) -> None:
        if not sources:
            raise UserError("data.sources: expected at least one source, got none")
        self.sources = dict(sources)
        self.weights = _shares(self.sources, weights)
        self.seed = seed

    def load(self) -> tuple[list[PreferencePair], list[LoadReport]]:
        """The mixture's pairs in a fixed order, and the reports of all sources.

        The reports count what the sources gave; the note ``used in the mixture`` on a source's first report says how
        many of its pairs were drawn.

        Raises:
            UserError: What the sources raise, a source without pairs, or two sources with the same pairs.
        """
        loaded: dict[str, list[PreferencePair]] = {}
        reports: dict[str, list[LoadReport]] = {}
        for key, source in self.sources.items():
            if self.weights[key]:
                loaded[key], reports[key] = source.load()
            else:
                reports[key] = [LoadReport(source=source.name, location="not read (weight 0)")]
        counts = _counts(self.weights, {key: len(pairs) for key, pairs in loaded.items()})
        for key, pairs in loaded.items():
            share = f"{counts[key]:,} of {len(pairs):,} pairs (share {float(self.weights[key]):.3g})"
            if reports[key]:
                reports[key][0].notes["used in the mixture"] = share
        drawn = {key: _draw(pairs, counts[key], f"{self.seed}/{key}") for key, pairs in loaded.items()}
        mixed = _interleave([*drawn.values()])
        _check_ids(mixed)
        return mixed, [report for key in self.sources for report in reports[key]]


def _exact(key: str, weight: float) -> Fraction:
    """A weight as it is written: 0.1 means one tenth, not the nearest binary fraction. Raises UserError: no number from 0."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise UserError(f"data.weights.{key}: expected a number ≥ 0, got {weight!r}")
    return Fraction(str(weight))


def _shares(sources: Mapping[str, PreferenceSource], weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Weights as exact fractions of one, in the order of the sources."""
    for key in weights:
        if key not in sources:
            hint = did_you_mean(key, sources)
            raise UserError(f"data.weights: unknown source {key!r} (expected {', '.join(sources)}){hint}")
    exact: dict[str, Fraction] = {}
    for key in sources:
        if key not in weights:
            raise UserError(f"data.weights: no weight for source {key!r} (got {', '.join(weights) or 'none'})")
        exact[key] = _exact(key, weights[key])
    total = sum(exact.values())
    if total == 0:
        raise UserError("data.weights: all weights are 0; expected at least one above 0")
    return {key: weight / total for key, weight in exact.items()}


def _counts(shares: Mapping[str, Fraction], available: Mapping[str, int]) -> dict[str, int]:
    """n_i = floor(w_i N) for the largest N with n_i ≤ available_i for all i.

    >>> _counts({"a": Fraction(3, 4), "b": Fraction(1, 4)}, {"a": 30, "b": 100})
    {'a': 30, 'b': 10}
    """
    empty = [key for key, n in available.items() if n == 0]
    if empty:
        raise UserError(f"data.sources.{empty[0]}: gave no pairs, so a mixture with it is empty; set its weight to 0")
    # floor(w N) ≤ n  ⟺  N < (n + 1) / w
    total = min(math.ceil((n + 1) / shares[key]) - 1 for key, n in available.items())
    return {key: math.floor(shares[key] * total) for key in available}


def _draw(pairs: Sequence[PreferencePair], n: int, seed: str) -> list[PreferencePair]:
    """A draw of n pairs without repetition, in their old order."""
    rank = random.Random(seed).random
    keyed = sorted(range(len(pairs)), key=lambda _: rank())
    return [pairs[i] for i in sorted(keyed[:n])]


def _interleave(parts: Sequence[Sequence[PreferencePair]]) -> list[PreferencePair]:
    """Spreads every part evenly over the whole, so that any stretch has about the shares of the mixture."""
    order = sorted((Fraction(2 * i + 1, 2 * len(part)), k, i) for k, part in enumerate(parts) for i in range(len(part)))
    return [parts[k][i] for _, k, i in order]


def _check_ids(pairs: Sequence[PreferencePair]) -> None:
    twice = [pair_id for pair_id, n in Counter(pair.pair_id for pair in pairs).items() if n > 1]
    if twice:
        raise UserError(
            f"data.sources: {len(twice)} pairs come from two sources, for example {twice[0]}; name every file once"
        )
