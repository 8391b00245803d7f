"""Text whose tokens are coloured by a number: blue above 0, orange below, in steps that the legend names; no mouse is needed."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer

from analysis.report.site_axes import as_text

STEPS = (0.1, 0.3, 1.0, 3.0)
"""Least |value| of each shade."""
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_MOST_NUMBERS = 6
"""Numbers that are written out in a text, at most."""


class Token(NamedTuple):
    """A token of a coloured text."""

    text: str
    shade: str
    """Class of its style: ``up1`` to ``up4``, ``down1`` to ``down4``, or nothing near 0."""
    number: str
    """Written behind it; empty for all but those furthest from 0."""


class ColouredText(NamedTuple):
    """A text under its name."""

    name: str
    tokens: Sequence[Token]


class ColouredPair(NamedTuple):
    """Texts that belong to one prompt."""

    title: str
    prompt: str
    texts: Sequence[ColouredText]


class Coloured(NamedTuple):
    """Coloured texts, and what their colours say."""

    heading: str
    how: str
    legend: Sequence[Token]
    pairs: Sequence[ColouredPair]


def coloured_text(name: str, texts: Sequence[str], values: Sequence[float]) -> ColouredText:
    """A text with a value for each token; the values furthest from 0 are written out."""
    furthest = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:_MOST_NUMBERS]
    numbered = {i for i in furthest if abs(values[i]) >= STEPS[1]}
    tokens = [
        Token(text, shade(value), as_text(value, "+.1f") if i in numbered else "")
        for i, (text, value) in enumerate(zip(texts, values, strict=True))
    ]
    return ColouredText(name, tokens)


def shade(value: float) -> str:
    """Style of a value.

    >>> shade(0.05), shade(0.1), shade(-2.0), shade(50.0)
    ('', 'up1', 'down3', 'up4')
    """
    step = sum(abs(value) >= least for least in STEPS)
    return f"{'up' if value > 0 else 'down'}{step}" if step else ""


def legend() -> list[Token]:
    """Every shade with its range, from below to above.

    >>> [token.text for token in legend()][3:6]
    ['−0.3 … −0.1', '−0.1 … 0.1', '0.1 … 0.3']
    """
    ends = [f"{least:g}" for least in STEPS]
    ranges = [f"{low} … {high}" for low, high in pairwise(ends)] + [f"{ends[-1]} and more"]
    below = [f"−{high} … −{low}" for low, high in pairwise(ends)] + [f"−{ends[-1]} and less"]
    above = [Token(text, f"up{i}", "") for i, text in enumerate(ranges, 1)]
    under = [Token(text, f"down{i}", "") for i, text in enumerate(below, 1)]
    return [*reversed(under), Token(f"−{ends[0]} … {ends[0]}", "", ""), *above]


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Text that each token adds to those before it; that of a split character stands with its last token."""
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        whole = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        if whole.endswith(_UNFINISHED) and end < len(ids):
            whole = done
        texts.append(whole[len(done) :])
        done = whole
    return texts
