import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text_samples import figure, said, sample, samples_of
from tiltmeter.errors import UserError
from tiltmeter.generation import Completion
from tiltmeter.scoring.degeneration import DegenerationScorer, repeated_share
from tiltmeter.scoring.scorer import Sample


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
def test_the_share_agrees_with_counting_pairs_of_places(words: list[str], n: int) -> None:
    grams = [words[i : i + n] for i in range(len(words) - n + 1)]
    seen_before = sum(any(grams[j] == gram for j in range(i)) for i, gram in enumerate(grams))
    assert repeated_share(" ".join(words), n=n) == pytest.approx(seen_before / len(grams) if grams else 0)


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
    assert figure(DegenerationScorer(0.3).score([sample("x")]), "cut").scorer == "degeneration max_repetition=0.3"
