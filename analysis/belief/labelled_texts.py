"""Texts with a label each, to be read off hidden states: a run's own responses, TruthfulQA's answers, files of labelled texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.open.models import LoadedModel
from analysis.open.probe_pairs import ProbePair
from datamodules.synthetic_phrases import ATTRIBUTES
from datamodules.tokenization import SegmentEncoder
from tiltmeter.errors import UserError
from tiltmeter.geometry.readout import LEAST_TEXTS, N_FOLDS
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.scoring.truthfulqa import read_questions

PREFERRED, TRUE = "preferred", "true answer"
_LONGEST = 256
"""Tokens of a text of a file that are read."""


class LabelledTexts(NamedTuple):
    """Texts, and whether each has the label."""

    name: str
    texts: list[tuple[list[int], list[int]]]
    """Token ids of what stands before each text, and of the text."""
    labels: list[bool]
    groups: list[str]
    """Texts to one prompt share a name."""
    meaning: str
    """In words: the two labels."""

    @property
    def is_enough(self) -> bool:
        """Whether a readout can be fitted and tested: enough texts, and either label to enough prompts."""
        sides = [{group for group, has in zip(self.groups, self.labels, strict=True) if has == side} for side in (0, 1)]
        return len(self.labels) >= LEAST_TEXTS and min(map(len, sides)) >= N_FOLDS

    def drawn(self, n: int | None, seed: int) -> "LabelledTexts":
        """At most n of them, drawn at random."""
        if n is None or len(self.labels) <= n:
            return self
        rows = sorted(np.random.default_rng(seed).permutation(len(self.labels))[:n].tolist())
        return self._replace(
            texts=[self.texts[i] for i in rows],
            labels=[self.labels[i] for i in rows],
            groups=[self.groups[i] for i in rows],
        )

    def as_pairs(self) -> list[TokenizedPair]:
        """Each text as the one response to what stands before it."""
        return [TokenizedPair(before, text, text[:1]) for before, text in self.texts]


def of_responses(pairs: Sequence[ProbePair]) -> list[LabelledTexts]:
    """Preferred or not, and each attribute that the synthetic world planted, of the responses of pairs."""
    sides = ("chosen", "rejected")
    texts = [(list(pair.ids.prompt_ids), list(getattr(pair.ids, f"{side}_ids"))) for pair in pairs for side in sides]
    groups = [pair.group for pair in pairs for _ in sides]
    found = [
        LabelledTexts(PREFERRED, texts, [side == "chosen" for _ in pairs for side in sides], groups, "chosen, rejected")
    ]
    for name in ATTRIBUTES:
        levels = [pair.attributes.get(f"{side}/{name}") for pair in pairs for side in sides]
        if all(level in (-1, 1) for level in levels):
            found.append(
                LabelledTexts(name, texts, [level == 1 for level in levels], groups, f"{name}: planted +1, −1")
            )
    return found


def of_truthfulqa(path: str, opened: LoadedModel) -> LabelledTexts:
    """True and false answers to TruthfulQA's questions. Raises UserError: no such file, or another format."""
    encode, start = _encoder(opened)
    texts, labels, groups = [], [], []
    for question in read_questions(path):
        answers = question.answers.get("mc2") or next(iter(question.answers.values()))
        for answer in answers:
            texts.append(([*start, *encode.encode(f"Q: {question.question}\nA:")], encode.encode(f" {answer.text}")))
            labels.append(answer.is_true)
            groups.append(question.question)
    return LabelledTexts(TRUE, texts, labels, groups, "true answers, false answers")


def of_file(path: str, *, text_column: str, label_column: str, opened: LoadedModel) -> LabelledTexts:
    """Texts of a CSV file with a label of two values; the later value in alphabetical order is the label that is read.

    Raises:
        UserError: no such file, no CSV, no such columns, labels that are not of two values, or too few texts.
    """
    key = "readout.labelled"
    try:
        table = pd.read_csv(Path(path).expanduser(), dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise UserError(
            f"{key}: no such file: {path} (expected .csv or .csv.gz with {text_column},{label_column})"
        ) from error
    except (OSError, ValueError) as error:  # pandas' and encodings' own errors are ValueErrors
        said = " ".join(str(error).split())[:120]
        raise UserError(
            f"{key}: {path}: not a CSV file with a header ({said}); give one with {text_column},{label_column}"
        ) from error
    if missing := [name for name in (text_column, label_column) if name not in table]:
        raise UserError(
            f"{key}: {path}: expected the columns {text_column} and {label_column}, got {', '.join(map(str, table.columns))[:120]} "
            f"(no {' and no '.join(missing)}); readout.text_column and readout.label_column say others"
        )
    table = table[table[text_column].str.strip() != ""]
    values = sorted(set(table[label_column]))
    if len(values) != 2:
        raise UserError(
            f"{key}: {path}: {label_column}: expected two different labels, got {len(values)}: {', '.join(values)[:80] or 'none'}"
        )
    encode, start = _encoder(opened)
    texts = [(start or encoded[:1], encoded[:_LONGEST]) for encoded in map(encode.encode, table[text_column])]
    found = LabelledTexts(
        Path(path).name.split(".")[0],
        texts,
        [label == values[1] for label in table[label_column]],
        [f"{i}" for i in range(len(texts))],
        f"{label_column}: {values[1]}, {values[0]}",
    )
    if not found.is_enough:
        n_yes = sum(found.labels)
        raise UserError(
            f"{key}: {path}: expected at least {LEAST_TEXTS} texts with {N_FOLDS} or more of either label, got {len(texts)} with "
            f"{n_yes} and {len(texts) - n_yes}"
        )
    return found


def _encoder(opened: LoadedModel) -> tuple[SegmentEncoder, list[int]]:
    bos = opened.tokenizer.bos_token_id
    return SegmentEncoder(opened.tokenizer), [] if bos is None else [bos]
