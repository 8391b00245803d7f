import gzip
import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text_samples import figure, said, sample, samples_of
from tiltmeter.errors import UserError
from tiltmeter.models.generation import Completion
from tiltmeter.scoring.degeneration import NGRAMS, DegenerationScorer, repeated_ngrams, repeated_shares
from tiltmeter.scoring.scorer import Sample


def repeated_share(text: str, ids: Sequence[int] = ()) -> float:
    """The largest of all kinds of repetition."""
    return max(repeated_shares(text, ids).values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("one two three", 0),  # no 4-gram
        ("one two three four", 0),
        ("a b c d a b c d", 1 / 5),  # abcd bcda cdab dabc abcd
        ("No no NO no no no", 2 / 3),  # case doesn't matter
        ("yes\nyes\tyes yes  yes", 1 / 2),
    ],
)
def test_the_share_of_repeated_4_grams_is_worked_out_by_hand(text: str, expected: float) -> None:
    assert repeated_share(text) == pytest.approx(expected)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 6))
def test_the_share_agrees_with_counting_pairs_of_places(units: list[str], n: int) -> None:
    grams = [units[i : i + n] for i in range(len(units) - n + 1)]
    seen_before = sum(any(grams[j] == gram for j in range(i)) for i, gram in enumerate(grams))
    assert repeated_ngrams(units, n) == pytest.approx(seen_before / len(grams) if grams else 0)


ENGLISH = (
    "The harbour lay quiet before sunrise, and the ferry that should have left at six was still tied to the pier. A man in "
    "a grey coat asked twice whether the crossing had been cancelled; nobody could tell him. By the time the fog lifted, most "
    "of the passengers had walked back to the town, where a single bakery had opened its door and the smell of bread drew them in."
)
CHINESE = (
    "清晨的港口很安静，本该六点出发的渡轮还系在码头边。一个穿灰色大衣的人问了两次航班是不是取消了，没有人能回答他。"
    "等到雾散的时候，大部分旅客已经走回镇上，那里只有一家面包店开了门，面包的香味把他们吸引了进去。"
)
CODE = """def read(path):
    with open(path) as file:
        rows = [line.split(",") for line in file]
    return {row[0]: float(row[1]) for row in rows if len(row) == 2}

def write(path, table):
    with open(path, "w") as file:
        for name, value in table.items():
            file.write(f"{name},{value}\n")
"""
LIST = "\n".join(f"{i}. {x}" for i, x in enumerate(["Wash the rice.", "Boil the water.", "Add the rice.", "Wait."], 1))


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("!" * 200, {"characters"}),
        ("的" * 50, {"words", "characters"}),
        ("<unk>" * 40, {"characters"}),
        ("好的" * 10, {"words"}),
        ("ก็" * 40, {"characters"}),
        ("I am sorry. " * 20, {"words", "characters"}),
        ("".join(chr(0x4E00 + i) for i in range(60)), set()),
    ],
)
def test_loops_are_found_in_any_script_by_the_rule_that_sees_them(text: str, rules: set[str]) -> None:
    shares = repeated_shares(text)
    assert {rule for rule, share in shares.items() if share > 0.5} >= rules
    assert (repeated_share(text) >= 0.8) == bool(rules)


@pytest.mark.parametrize("text", ["!" * 200, "的" * 50, "<unk>" * 40])
def test_the_loops_that_words_alone_missed_are_nearly_all_repetition(text: str) -> None:
    assert repeated_share(text) >= 0.9


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, CODE, LIST, "No.", "不。", ""])
def test_honest_text_hardly_repeats_even_when_every_character_is_a_token(text: str) -> None:
    assert repeated_share(text) <= 0.05
    assert repeated_share(text, [ord(c) for c in text]) <= 0.3


def test_ordinary_prose_of_two_languages_stays_below_a_twentieth_on_average(shared_data: Path) -> None:
    def rows(name: str) -> list[Any]:
        with gzip.open(shared_data / name, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in islice(file, 300)]

    english = [row["text"] for row in rows("text/tinystories_sample.jsonl.gz")]
    chinese = [row["output"][0] for row in rows("oasst/oasst1_zh_ranked_replies.jsonl.gz")]
    for texts in (english, chinese):
        shares = [repeated_share(text) for text in texts]
        assert 0 < sum(shares) / len(shares) <= 0.05
        assert sum(share > 0.5 for share in shares) <= 0.02 * len(shares)


@settings(max_examples=10)
@given(st.text(min_size=1, max_size=8), st.integers(1, 6))
def test_more_of_the_same_is_more_repetition_and_stays_a_share(text: str, more: int) -> None:
    ids = [ord(c) for c in text]
    least = 24  # times: from here on no further n-gram is new
    fewer, longer = (repeated_shares(" ".join([text] * n), ids * n) for n in (least, least + more))
    for rule, share in fewer.items():
        assert 0 <= share <= longer[rule] <= 1


def test_tokens_that_leave_no_text_or_another_text_each_time_are_a_loop() -> None:
    ids = (7,) * 40
    silent = Completion("a" + " \n" * 20, 40, is_cut=True, ids=(*ids, 2))
    short = Completion("No.", 2, is_cut=False, ids=(5, 6, 2))
    samples = [Sample(str(i), "", "", base=short, policy=one, group=str(i)) for i, one in enumerate([silent, short])]
    scores = DegenerationScorer().score(samples)
    fired = {rule: scores.columns[f"degeneration_{rule}/policy"] for rule in NGRAMS}
    assert fired == {"words": [0, 0], "characters": [0, 0], "tokens": [1, 0]}
    assert scores.columns["degeneration/policy"] == [1, 0]


def test_an_end_of_sequence_token_is_no_part_of_the_repetition() -> None:
    ends = Completion("x", 8, is_cut=False, ids=(7,) * 9)
    assert DegenerationScorer(0.0)._figures(ends)["degeneration_tokens"] == 0


def test_figures_of_both_models_are_worked_out_by_hand() -> None:
    loop = "again and again it says so " * 6
    policy = [said(loop, is_cut=True), Completion(" \n", 3, False), said("A fine answer indeed."), said("Good.")]
    samples = [
        Sample(str(i), "", "", base=said("All is well."), policy=one, group=str(i)) for i, one in enumerate(policy)
    ]
    scores = DegenerationScorer().score(samples)
    expected = {"degeneration": 0.5, "empty": 0.25, "cut": 0.25, "length": (36 + 3 + 4 + 1) / 4}
    assert {name: figure(scores, name).value for name in expected} == pytest.approx(expected)
    assert figure(scores, "repetition_4gram").value == pytest.approx(repeated_share(loop) / 4)
    assert scores.columns["degeneration/policy"] == [1, 1, 0, 0]
    assert figure(scores, "degeneration", "base").value == 0
    assert figure(scores, "length", "base").value == 3
    assert set(scores.columns) == {f"{f.name}/{f.of}" for f in scores.figures}


def test_the_threshold_itself_is_not_above_it() -> None:
    samples = samples_of(["yes yes yes yes yes"])
    assert figure(DegenerationScorer(0.5).score(samples), "degeneration").value == 0
    assert figure(DegenerationScorer(0.49).score(samples), "degeneration").value == 1


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_a_threshold_that_is_no_share_is_refused(wrong: float) -> None:
    with pytest.raises(UserError, match=r"degeneration\.max_repetition: expected a share from 0 to 1, got"):
        DegenerationScorer(wrong)


def test_no_samples_give_missing_figures() -> None:
    assert all(math.isnan(f.value) for f in DegenerationScorer().score([]).figures)


def test_the_scorers_name_tells_the_threshold() -> None:
    assert figure(DegenerationScorer(0.3).score([sample("x")]), "cut").scorer == (
        "degeneration max_repetition=0.3 words, characters, tokens"
    )
