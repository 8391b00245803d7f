"""Text that is broken whatever it says: empty, cut off, or the same words, characters or tokens again and again."""

import re
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from tiltmeter.errors import UserError
from tiltmeter.models.generation import Completion
from tiltmeter.scoring.scorer import Sample, Scores, mean_figure

Rule = Literal["words", "characters", "tokens"]
NGRAMS: Mapping[Rule, int] = MappingProxyType({"words": 4, "characters": 20, "tokens": 8})
"""Length of the n-grams that are counted, long enough that ordinary text hardly repeats one (docs/scorers.md has the shares)."""

_SPACELESS = (  # Thai, Lao, Tibetan, Burmese, Khmer, kana, Han
    r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    r"\U00020000-\U0003ffff"
)
_CHARACTER = re.compile(f"[{_SPACELESS}]")
_WORD = re.compile(rf"[{_SPACELESS}]|[^\s{_SPACELESS}]+")


def repeated_ngrams(units: Sequence[Hashable], n: int) -> float:
    """Share of the n-grams of a sequence that were there before: 1 − distinct / all, 0 … 1; 0 where there are none.

    ``seq-rep-n`` of Welleck et al. 2020 (arXiv 1908.04319).

    >>> repeated_ngrams("aaaaaa", 4)
    0.6666666666666667
    """
    grams = list(zip(*(units[at:] for at in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repeated_shares(text: str, ids: Sequence[int] = ()) -> dict[Rule, float]:
    """Share of n-grams that were there before, by what they are made of; lengths: :data:`NGRAMS`.

    - ``words``: what stands between white space, in lower case; in scripts without spaces every character is one, and where
      most are, n is doubled, since a word has about two.
    - ``characters``: in lower case, any white space one space.
    - ``tokens``: the model's own.

    Args:
        ids: token ids; empty: not known, share 0.
    """
    words = _WORD.findall(text.lower())
    n_spaceless = sum(_CHARACTER.match(word) is not None for word in words)
    n = NGRAMS["words"] * (2 if 2 * n_spaceless > len(words) else 1)
    return {
        "words": repeated_ngrams(words, n),
        "characters": repeated_ngrams(" ".join(text.lower().split()), NGRAMS["characters"]),
        "tokens": repeated_ngrams(ids, NGRAMS["tokens"]),
    }


class DegenerationScorer:
    """Figures of both models: ``degeneration`` and what it is made of.

    - ``degeneration``: share of completions that are empty or, by any rule, repeat more than ``max_repetition`` of their n-grams.
    - ``degeneration_words``, ``…_characters``, ``…_tokens``: share of completions at which that rule fired, see
      :func:`repeated_shares`; a completion can break several.
    - ``repetition_4gram``: mean share of repeated n-grams of words.
    - ``empty``, ``cut``: share of completions without anything to read, and of those cut at the token limit.
    - ``length``: mean length in tokens, the end-of-sequence token not counted.

    Args:
        max_repetition: share of repeated n-grams above which a completion counts as degenerate, 0 … 1.
    """

    is_slow = False

    def __init__(self, max_repetition: float = 0.5) -> None:
        if not 0 <= max_repetition <= 1:
            raise UserError(f"degeneration.max_repetition: expected a share from 0 to 1, got {max_repetition}")
        self.max_repetition = max_repetition
        self.name = f"degeneration max_repetition={max_repetition:g} words, characters, tokens"

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
        shares = repeated_shares(completion.text, completion.ids[: completion.n_tokens])
        fired = [share > self.max_repetition for share in shares.values()]
        found = (
            completion.is_empty or any(fired),
            *fired,
            shares["words"],
            completion.is_empty,
            completion.is_cut,
            completion.n_tokens,
        )
        return dict(zip(_FIGURES, map(float, found), strict=True))


_FIGURES = ("degeneration", *(f"degeneration_{rule}" for rule in NGRAMS), "repetition_4gram", "empty", "cut", "length")
