"""Samples of text for tests of scorers."""

from collections.abc import Sequence
from typing import Any

from tiltmeter.models.generation import Completion
from tiltmeter.scoring.scorer import Figure, Sample, Scores


def said(text: str, *, is_cut: bool = False) -> Completion:
    return Completion(text, len(text.split()), is_cut)


def sample(policy: str, base: str = "fine", *, pair_id: str = "a", **options: Any) -> Sample:
    """What two models said; the prompt is its own group."""
    fields = {"prompt": "Say something.", "chosen": "A good answer.", "group": pair_id} | options
    return Sample(pair_id=pair_id, policy=said(policy), base=said(base), **fields)


def samples_of(policy: Sequence[str], base: Sequence[str] | None = None, **options: Any) -> list[Sample]:
    """A prompt a completion."""
    others = base or ["fine"] * len(policy)
    texts = zip(policy, others, strict=True)
    return [sample(ours, theirs, pair_id=str(i), **options) for i, (ours, theirs) in enumerate(texts)]


def figure(scores: Scores, name: str, of: str = "policy") -> Figure:
    (found,) = [figure for figure in scores.figures if (figure.name, figure.of) == (name, of)]
    return found
