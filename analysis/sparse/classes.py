"""Classes of sparse features: style, alignment or other; by a file, by planted attributes, or by a judge who reads examples."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.open.probe_pairs import ProbePair
from analysis.report.site_axes import as_text
from datamodules.synthetic_phrases import ATTRIBUTES
from tiltmeter.errors import UserError
from tiltmeter.judges.answers import ask_choices
from tiltmeter.judges.judge import Judge, Question
from tiltmeter.judges.prompts import CLASSIFY_FEATURE, EXPLAIN_FEATURE
from tiltmeter.plain_text import did_you_mean
from tiltmeter.sparse.feature_sets import attribute_of_features, correlations

STYLE, ALIGNMENT, OTHER = "style", "alignment", "other"
CLASSES = (STYLE, ALIGNMENT, OTHER)
ALIGNMENT_ATTRIBUTES = ("tone", "refusal")
"""Attributes of the synthetic world that are about how good a response is; the others are about how it is written."""
_COLUMNS = ("index", "label", "explanation")
_CHOICES: dict[str, str] = {"S": STYLE, "A": ALIGNMENT, "O": OTHER}
_WORDS = 60
"""Tokens of an explanation, at most."""


class FeatureClasses(NamedTuple):
    """Class of each feature of an autoencoder."""

    labels: list[str]
    explanations: list[str]
    error: float
    """Probability that a label is wrong, as far as it is known; NaN: it isn't."""
    how: str
    """By what they were told, in words."""
    attributes: Sequence[str] = ()
    """Planted attribute of each feature, empty where it has none; no entry at all where nothing is planted."""

    def numbers(self) -> Tensor:
        """Place of each label among the classes."""
        return torch.tensor([CLASSES.index(label) for label in self.labels])


def classes_of_file(path: str, width: int, *, error: float | None) -> FeatureClasses:
    """Classes of a CSV file with a row for every feature: index, label and, if there is one, explanation.

    Args:
        width: number of features.
        error: probability that a label is wrong; None: not known.

    Raises:
        UserError: no such file, a column or a feature is missing, a feature comes twice, or a label is unknown.
    """
    where = Path(path).expanduser()
    try:
        with where.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error_:
        raise UserError(f"sparse_features.labels: {path}: cannot be read ({error_})") from error_
    missing = [name for name in _COLUMNS[:2] if not rows or name not in rows[0]]
    if missing:
        raise UserError(f"sparse_features.labels: {path}: expected the columns index and label, got no {missing[0]}")
    labels: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(rows, 2):
        here = f"sparse_features.labels: {path}: line {number}"
        text, label = str(row["index"]).strip(), str(row["label"]).strip().lower()
        if not text.isdecimal() or int(text) >= width:
            raise UserError(f"{here}: expected an index from 0 to {width - 1}, got {text!r:.40}")
        if label not in CLASSES:
            raise UserError(
                f"{here}: expected a label out of {', '.join(CLASSES)}, got {label!r:.40}{did_you_mean(label, CLASSES)}"
            )
        if int(text) in labels:
            raise UserError(f"{here}: feature {text} comes twice; keep one of its rows")
        labels[int(text)] = label, str(row.get("explanation") or "")
    gaps = [index for index in range(width) if index not in labels]
    if gaps:
        raise UserError(
            f"sparse_features.labels: {path}: expected a row for each of {width} features, got none for {gaps[0]}"
            f"{f' and {len(gaps) - 1} others' if gaps[1:] else ''}; give them the label {OTHER}"
        )
    told = [labels[index] for index in range(width)]
    unknown = float("nan") if error is None else error
    return FeatureClasses([label for label, _ in told], [why for _, why in told], unknown, f"the file {where.name}")


def has_planted(pairs: Sequence[ProbePair]) -> bool:
    """Whether every response has a level of each attribute that the synthetic world plants."""
    return bool(pairs) and all(
        pair.attributes.get(f"{side}/{name}") in (-1, 1)
        for pair in pairs
        for side in ("chosen", "rejected")
        for name in ATTRIBUTES
    )


def classes_of_attributes(
    means: Float[Tensor, "text width"],
    pairs: Sequence[ProbePair],
    is_first_half: Sequence[bool],
    *,
    alignment: Sequence[str] = ALIGNMENT_ATTRIBUTES,
    least: float = 0.3,
) -> FeatureClasses:
    """Classes by the planted attribute that a feature's mean activation goes with, on one half of the prompts and on the other.

    Args:
        means: activation of each feature, the mean over the tokens of a response: chosen and rejected of each pair in turn.
        pairs: whose responses they are.
        is_first_half: of each pair: attributes are chosen on these, and confirmed on the others.
        alignment: attributes whose features are called alignment.
        least: |r| in either half below which a feature is called other.
    """
    levels = torch.tensor(
        [
            [float(pair.attributes[f"{side}/{name}"]) for name in ATTRIBUTES]
            for pair in pairs
            for side in ("chosen", "rejected")
        ]
    )
    first = torch.tensor(list(is_first_half)).repeat_interleave(2)
    chosen_on, held_out = (correlations(means[rows], levels[rows]) for rows in (first, ~first))
    kinds = [ALIGNMENT if name in alignment else STYLE for name in ATTRIBUTES]
    found = attribute_of_features(chosen_on, held_out, kinds, least=least)
    labels = [OTHER if i < 0 else kinds[i] for i in found.attribute.tolist()]
    why = [
        "" if i < 0 else f"{ATTRIBUTES[i]} (r = {as_text(r, '+.2f')} on held-out responses)"
        for i, r in zip(found.attribute.tolist(), found.correlation.tolist(), strict=True)
    ]
    names = ["" if i < 0 else ATTRIBUTES[i] for i in found.attribute.tolist()]
    how = "planted attributes, by correlation on held-out responses"
    return FeatureClasses(labels, why, found.disagreement, how, names)


def classes_of_judge(
    judge: Judge, examples: Sequence[Sequence[str]], features: Sequence[int], width: int
) -> FeatureClasses:
    """Classes by a judge, who explains each feature by the texts that it is most active in, then says what kind it is, twice.

    The kinds stand in one order and in the opposite one; a feature whose two answers differ is called other, and their share is the
    error of the labels.

    Args:
        examples: of each feature that is asked about: texts with the active token between « and ».
        features: their numbers; all others are called other.
        width: number of features.
    """
    questions = [
        Question(
            EXPLAIN_FEATURE.fill({}, [("examples", "texts", "\n".join(texts))], seed=i),
            EXPLAIN_FEATURE.id,
            max_tokens=_WORDS,
        )
        for i, texts in enumerate(examples)
    ]
    said = [
        " ".join(reply.texts[0].split()) if reply.texts else "" for reply in (judge.ask(questions) if questions else [])
    ]
    answers = []
    for order in (list(_CHOICES), list(_CHOICES)[::-1]):
        kinds = "\n".join(f"{letter}: {_MEANING[_CHOICES[letter]]}" for letter in order)
        asked = [
            Question(
                CLASSIFY_FEATURE.fill({"kinds": kinds}, [("feature", "description", text)], seed=i), CLASSIFY_FEATURE.id
            )
            for i, text in enumerate(said)
        ]
        found = ask_choices(judge, asked, order)
        answers.append([max(a.weights, key=a.weights.__getitem__) if a.weights else "" for a in found])
    labels, why, n_differ = [OTHER] * width, [""] * width, 0
    for feature, text, first, second in zip(features, said, *answers, strict=True):
        labels[feature] = _CHOICES[first] if first and first == second else OTHER
        why[feature] = text
        n_differ += first != second
    error = n_differ / len(said) if said else float("nan")
    return FeatureClasses(labels, why, error, f"the judge {judge.name}, who read the texts that each is most active in")


_MEANING = {
    STYLE: "how something is written: format, punctuation, length, markup, openings, politeness formulas, sentence structure",
    ALIGNMENT: "whether it is good: refusal, harm, honesty, ethics, insult, care for the person, safety",
    OTHER: "anything else: topics, names, grammar, single words",
}
