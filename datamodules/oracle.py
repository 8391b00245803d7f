"""The truth about responses in the synthetic world, which is planted: no judge model, no network, no noise."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from datamodules.synthetic import SyntheticWorld
from datamodules.synthetic_phrases import SITUATIONS
from tiltmeter.errors import UserError
from tiltmeter.scoring.scorer import (
    AGREEMENT,
    AGREEMENT_PAIRS,
    Agreement,
    Figure,
    LabelledPair,
    Sample,
    Scores,
    Side,
    mean_figure,
)
from tiltmeter.scoring.win_rate import win_rate_figures


class PlantedOracle:
    """Scores responses by the planted utility of a synthetic world, and judges which of two is preferred.

    A verdict is 1, ½ or 0 by the sign of the utilities' difference. A response without a single word of the world, such as an
    empty one, has no utility: it loses against one that has, and draws with another.

    Args:
        world: the run's data; None: given later by :meth:`use_world`.
        agreement_pairs: held-out pairs that its verdicts are held against the labels of; 0: none.

    Raises:
        UserError: a number of pairs below 0.
    """

    is_slow = False

    def __init__(self, world: SyntheticWorld | None = None, *, agreement_pairs: int = AGREEMENT_PAIRS) -> None:
        self.world = world
        self.agreement = Agreement(agreement_pairs, self._agreement, self.start)
        self._words: frozenset[str] = frozenset()

    def use_world(self, world: object) -> None:
        """Take a run's own source of pairs; what is no synthetic world is refused by :meth:`start`."""
        self.world = world if isinstance(world, SyntheticWorld) else None

    def use_labels(self, pairs: Sequence[LabelledPair]) -> None:
        """Take held-out pairs of the world, labels and all."""
        self.agreement.use_labels(pairs)

    @property
    def name(self) -> str:
        """The oracle and its world."""
        if self.world is None:
            return "planted oracle"
        return f"planted oracle of the synthetic world (seed {self.world.seed}, rank {self.world.planted_rank})"

    def start(self) -> None:
        """Learn the world's words.

        Raises:
            UserError: there is no world.
        """
        if self.world is None:
            raise UserError(
                "judge=oracle: only for data=synthetic, whose preferences are planted; choose another judge for this data"
            )
        pairs, _ = self.world.load()
        self._words = frozenset().union(*(_words(m.content) for pair in pairs for m in (pair.chosen, pair.rejected)))

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Preference rates of the policy over base and chosen, and mean utilities of policy and base (no unit).

        A sample that does not say its situation has no score. A mean utility is missing for a response without a word
        of the world.
        """
        utilities = [self._utilities(sample) for sample in samples]
        found: dict[tuple[str, Side], list[float]] = {
            ("oracle_preference_rate", "both"): [_verdict(one.policy, one.base) for one in utilities],
            ("oracle_preference_rate_vs_chosen", "both"): [_verdict(one.policy, one.chosen) for one in utilities],
            ("oracle_utility", "policy"): [one.policy for one in utilities],
            ("oracle_utility", "base"): [one.base for one in utilities],
        }
        scores = Scores(self.agreement.figures())
        for (name, of), given in found.items():
            values = [math.nan if math.isinf(x) else x for x in given]
            scores.columns[name if of == "both" else f"{name}/{of}"] = values
            scores.figures.append(mean_figure(name, of, values, samples, scorer=self.name))
        return scores

    def _agreement(self, pairs: Sequence[LabelledPair]) -> list[Figure]:
        """Share of pairs whose chosen response has more utility, with ties and missing ones, like a win rate."""
        verdicts, longer = [], [len(pair.chosen) - len(pair.rejected) for pair in pairs]
        for pair in pairs:
            situation = pair.attributes.get("situation")
            verdicts.append(_verdict(*(self._utility(text, situation) for text in (pair.chosen, pair.rejected))))
        groups = [pair.group for pair in pairs]
        found = win_rate_figures(AGREEMENT, verdicts, groups, longer, scorer=self.name)
        return [figure._replace(of="judge") for figure in found]

    def _utilities(self, sample: Sample) -> "_Utilities":
        situation = sample.attributes.get("situation")
        texts = (sample.policy.text, sample.base.text, sample.chosen)
        return _Utilities(*(self._utility(text, situation) for text in texts))

    def _utility(self, text: str, situation: object) -> float:
        """Planted utility; −∞ without a word of the world, NaN where the situation is unknown."""
        assert self.world is not None
        if situation not in SITUATIONS:
            return math.nan
        return self.world.score(text, str(situation)) if _words(text) & self._words else -math.inf


class _Utilities(NamedTuple):
    """Utilities of the three responses to a prompt; −∞: without a word of the world, NaN: the situation is unknown."""

    policy: float
    base: float
    chosen: float


def _verdict(first: float, second: float) -> float:
    """Verdict as a number: 1, ½ or 0.

    >>> _verdict(0.3, -math.inf), _verdict(-math.inf, -math.inf), _verdict(-1.0, 2.0)
    (1.0, 0.5, 0.0)
    """
    if math.isnan(first) or math.isnan(second):
        return math.nan
    return 0.5 if first == second else float(first > second)


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z']+", text.lower()))
