"""How well a scorer of toxicity agrees with people: AUC on every labelled source, and against RealToxicityPrompts' own scores.

    python benchmarks/toxicity_auc.py                          # the built-in word list, under a minute
    python benchmarks/toxicity_auc.py --words-file FILE        # words of your own
    python benchmarks/toxicity_auc.py --model unbiased --revision COMMIT   # a classifier, by preset, hub id or folder

AUC is the chance that a toxic text scores above a harmless one, ties counting half: 0.5 is guessing.
"""

import argparse
import csv
import gzip
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from datamodules.files.jsonl import read_rows
from tiltmeter.errors import UserError
from tiltmeter.scoring.toxicity import WordListToxicity
from tiltmeter.scoring.toxicity_classifier import ClassifierToxicity


class Labelled(NamedTuple):
    """A source of texts that people, or RealToxicityPrompts' scorer, called toxic or not."""

    name: str
    texts: list[str]
    is_toxic: list[bool]


def load_sources(data: Path) -> Iterator[Labelled]:
    """The labelled sources below a folder of data, in a fixed order."""
    folder = data / "toxicity-labelled"
    yield from_csv("Wikipedia talk", folder / "wikipedia_talk_toxicity_test.csv.gz", "comment", "toxic", "True".__eq__)
    yield from_csv("Surge social media", folder / "surge_toxicity_en.csv.gz", "text", "is_toxic", "Toxic".__eq__)
    yield from_csv("Jigsaw sample", folder / "jigsaw_test_101.csv.gz", "comment_text", "toxic", "1".__eq__)
    hatecheck = folder / "hatecheck_test_suite_cases.csv.gz"
    yield from_csv("HateCheck", hatecheck, "test_case", "label_gold", "hateful".__eq__)
    texts: list[str] = []
    is_toxic: list[bool] = []
    for _, row in read_rows(data / "real-toxicity-prompts" / "rtp_quark_val5000.jsonl.gz"):
        for part in (row["prompt"], row["continuation"]):
            if part["toxicity"] is not None:
                texts.append(part["text"])
                is_toxic.append(part["toxicity"] >= 0.5)
    yield Labelled("RealToxicityPrompts, Perspective ≥ 0.5", texts, is_toxic)


def from_csv(name: str, path: Path, text: str, label: str, is_toxic: Callable[[str], bool]) -> Labelled:
    """A source in a gzipped CSV file, by the names of its columns."""
    try:
        with gzip.open(path, "rb") as raw:
            rows = list(csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline="")))
    except FileNotFoundError as error:
        raise UserError(f"--data: no such file: {path} (docs/data.md says where it comes from)") from error
    return Labelled(name, [row[text] for row in rows], [is_toxic(row[label]) for row in rows])


def auc(scorer: WordListToxicity | ClassifierToxicity, source: Labelled) -> tuple[float, int]:
    """Area under the ROC curve over the texts that have a score, and how many have none."""
    from sklearn.metrics import roc_auc_score  # slow to import

    scores = [score.value for score in scorer.score_texts(source.texts)]
    kept = [i for i, score in enumerate(scores) if not math.isnan(score)]
    area = roc_auc_score([source.is_toxic[i] for i in kept], [scores[i] for i in kept])
    return float(area), len(scores) - len(kept)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with toxicity-labelled/ and real-toxicity-prompts/")
    parser.add_argument("--words-file", help="words of your own instead of the built-in list")
    parser.add_argument("--model", help="preset, hub id or folder of a classifier instead of the word list")
    parser.add_argument("--revision", help="commit of --model")
    parser.add_argument("--label", help="label of --model that is scored")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.data is None:
        if "TILTMETER_SHARED" not in os.environ:
            raise UserError("--data: expected a folder, got none, and TILTMETER_SHARED is not set (see docs/data.md)")
        arguments.data = Path(os.environ["TILTMETER_SHARED"]) / "data"
    if arguments.words_file and arguments.model:
        raise UserError("--words-file: not with --model; choose one of the two")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    scorer: WordListToxicity | ClassifierToxicity = WordListToxicity(arguments.words_file)
    if arguments.model:
        options = {"revision": arguments.revision, "label": arguments.label, "device": arguments.device}
        scorer = ClassifierToxicity(arguments.model, **options)
    scorer.start()
    rows, areas = [], {}
    for source in load_sources(arguments.data):
        started = time.perf_counter()
        area, n_missing = auc(scorer, source)
        seconds = time.perf_counter() - started
        areas[source.name.split(",")[0].replace(" ", "_").lower()] = area
        counts = f"{len(source.texts):,}", f"{sum(source.is_toxic):,}", str(n_missing)
        rows.append([source.name, *counts, f"{area:.3f}", f"{len(source.texts) / seconds:,.0f}"])
    common.print_table(
        f"AUC of {scorer.figure} ({scorer.name})", ["source", "texts", "toxic", "no score", "AUC", "texts/s"], rows
    )
    common.print_result(**areas)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(common.WRONG_INPUT)
