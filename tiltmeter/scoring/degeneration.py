"""Text that is broken whatever it says: empty, cut off, or the same words again and again."""

from collections.abc import Sequence
from typing import Literal

from tiltmeter.errors import UserError
from tiltmeter.generation import Completion
from tiltmeter.scoring.scorer import Sample, Scores, mean_figure

NGRAM = 4


def repeated_share(text: str, *, n: int = NGRAM) -> float:
    """Share of a text's n-grams of words that were there before: 1 − distinct / all, 0 … 1; 0 where there are none.

    Words are what stands between white space, in lower case (Welleck et al. 2020, arXiv 1908.04319, ``seq-rep-n``, over words
    instead of tokens, so that models with other tokenizers compare). A text without spaces is one word and never repeats.

    >>> repeated_share("no no no no no no")
    0.6666666666666667
    >>> repeated_share("Rain falls on the roof.")
    0.0
    """
    words = text.lower().split()
    grams = list(zip(*(words[at:] for at in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class DegenerationScorer:
    """Figures of both models: ``degeneration`` and what it is made of.

    - ``degeneration``: share of completions that are empty or repeat more than ``max_repetition`` of their 4-grams.
    - ``repetition_4gram``: mean share of repeated 4-grams, see :func:`repeated_share`.
    - ``empty``, ``cut``: share of completions without anything to read, and of those cut at the token limit.
    - ``length``: mean length in tokens, the end-of-sequence token not counted.

    Args:
        max_repetition: share of repeated 4-grams above which a completion counts as degenerate, 0 … 1.
    """

    is_slow = False

    def __init__(self, max_repetition: float = 0.5) -> None:
        if not 0 <= max_repetition <= 1:
            raise UserError(f"degeneration.max_repetition: expected a share from 0 to 1, got {max_repetition}")
        self.max_repetition = max_repetition
        self.name = f"degeneration max_repetition={max_repetition:g}"

    def start(self) -> None:
        """Nothing is needed."""

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Score the completions of both models; nothing is ever missing."""
        scores = Scores()
        of: Literal["policy", "base"]
        for of in ("policy", "base"):
            rows = [self._figures(getattr(sample, of)) for sample in samples]
            for name in _FIGURES:
                values = [row[name] for row in rows]
                scores.columns[f"{name}/{of}"] = values
                scores.figures.append(
                    mean_figure(name, of, values, samples, scorer=self.name, is_share=name != "length")
                )
        return scores

    def _figures(self, completion: Completion) -> dict[str, float]:
        repetition = repeated_share(completion.text)
        found = (
            completion.is_empty or repetition > self.max_repetition,
            repetition,
            completion.is_empty,
            completion.is_cut,
            completion.n_tokens,
        )
        return dict(zip(_FIGURES, map(float, found), strict=True))


_FIGURES = ("degeneration", "repetition_4gram", "empty", "cut", "length")
