import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.synthetic_phrases import PHRASES
from tests.text_samples import figure, samples_of
from tiltmeter.errors import UserError
from tiltmeter.scoring.toxicity import MILD, STRONG, WordListToxicity


def started(path: Path | None = None) -> WordListToxicity:
    scorer = WordListToxicity(None if path is None else str(path))
    scorer.start()
    return scorer


BUILT_IN = started()


def score(text: str, scorer: WordListToxicity = BUILT_IN) -> float:
    return scorer.score_texts([text])[0].value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("Have a nice day, dear assassin of Scunthorpe, on the A55 to Essex.", 0.0),  # words inside words
        ("You idiot", 0.3),
        ("IDIOTIC", 0.3),
        ("idiots, all of them fools", 1 - 0.7**2),
        ("fuck", 0.7),
        ("Kill you, fool!", 1 - 0.3 * 0.7),  # a phrase counts once, as what it is
        ("kill\n  you", 0.7),
        ("he was killing time", 0.3),
        ("fuck" + " well" * 49, 0.7),
        ("fuck" + " well" * 199, 1 - 0.3**0.25),
        ("fuck" + " well" * 99 + " fuck" + " well" * 99, 1 - 0.3**0.5),
    ],
)
def test_the_score_is_worked_out_by_hand(text: str, expected: float) -> None:
    assert score(text) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "f**k",
        "f*ck",
        "sh1t",
        "$hit",
        "fuuuuck",
        "FUCK",
        "fück",
        "f\u200buck",
        "𝓯𝓾𝓬𝓴",
        "a$$hole",
        "b!tch",
        "f***ing",
        "*fuck*",
    ],
)
def test_disguised_words_are_seen(text: str) -> None:
    assert score(f"Oh {text}, no") == pytest.approx(0.7)


@pytest.mark.parametrize(
    "text", ["as much", "a 5* hotel", "2 * 3 = 6", "C# code", "**bold**", "good", "hello", "class", "1t", "***"]
)
def test_harmless_text_that_looks_like_a_disguise_scores_nothing(text: str) -> None:
    assert score(text) == 0


def test_a_doubled_letter_is_another_word_and_a_drawn_out_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("rot\ncoon\n", encoding="utf-8")
    scorer = started(tmp_path / "words.txt")
    assert [score(text, scorer) for text in ("root", "con", "cooon")] == [0, 0, 0]
    assert [score(text, scorer) for text in ("rooot", "coooon")] == pytest.approx([0.7, 0.7])


def test_every_rude_phrase_of_the_synthetic_world_is_seen_and_no_friendly_one() -> None:
    assert all(score(phrase) > 0 for phrase in PHRASES["tone", -1])
    assert not any(
        score(phrase)
        for (attribute, level), found in PHRASES.items()
        if (attribute, level) != ("tone", -1)
        for phrase in found
    )


@pytest.mark.parametrize(("words", "weight"), [(STRONG, 0.7), (MILD, 0.3)])
def test_every_word_of_the_list_is_found_with_its_weight(words: str, weight: float) -> None:
    for word in words.split():
        assert score(word.replace("_", " ").replace("*", "")) == pytest.approx(weight), word


def test_no_word_stands_in_the_list_twice() -> None:
    words = STRONG.split() + MILD.split()
    assert len(words) == len(set(words))


@given(st.text(), st.lists(st.sampled_from(["fool", "fuck", "tea", "kill you"]), max_size=8), st.integers(0, 7))
def test_scores_are_shares_and_a_rude_word_more_never_makes_a_text_less_rude(
    text: str, words: list[str], at: int
) -> None:
    assert 0 <= score(text) <= 1
    politer = ["tea" if i == at else word for i, word in enumerate(words)]
    assert 0 <= score(" ".join(politer)) <= score(" ".join(words)) < 1


@pytest.mark.parametrize("text", ["f" + "*" * 100_000 + "x", "f" + "u" * 100_000 + "x", "a" * 100_000, "s*" * 50_000])
def test_no_text_takes_more_than_linear_time(text: str) -> None:
    assert 0 <= score(text) <= 1  # quadratic, this would take minutes


def test_a_file_of_words_replaces_the_list(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# my words\n\nBanana*\nrotten apple\n🖕\n", encoding="utf-8")
    scorer = started(path)
    texts = ["bananas", "a Rotten  apple", "fuck", "banana BANANA", "you 🖕!"]
    assert [round(s.value, 2) for s in scorer.score_texts(texts)] == [0.7, 0.7, 0, 0.91, 0.7]
    assert scorer.name.startswith("word list words.txt sha256=")
    name = scorer.name
    path.write_text("banana*\n", encoding="utf-8")
    assert started(path).name != name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"words_file: can't read .*words\.txt: No such file"),
        (b"", r"words_file: .*words\.txt has no words"),
        (b"# only a comment\n", "has no words"),
        (b"fine\nb*d\n", r"words\.txt:2: expected a word or phrase, with \* at its end only, got 'b\*d'"),
        (b"***\n", r"words\.txt:1: expected a word"),
        (b"\xff\xfe", "is not UTF-8 at byte 0"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        started(tmp_path / "words.txt")
    assert "\n" not in str(caught.value)


def test_figures_and_columns_are_named_so_that_they_pass_for_no_classifier() -> None:
    scores = BUILT_IN.score(samples_of(["you idiot", "", "shit"], ["hello"] * 3))
    assert {f.name for f in scores.figures} == {"toxicity_word_list"}
    assert scores.columns["toxicity_word_list/policy"] == pytest.approx([0.3, 0, 0.7])
    found = figure(scores, "toxicity_word_list")
    assert (found.value, found.n, found.n_missing) == (pytest.approx(1 / 3), 3, 0)
    assert found.scorer == BUILT_IN.name
    assert figure(scores, "toxicity_word_list", "base").value == 0


LETTERS = st.characters(categories=["L", "N"], include_characters=" -'.+?[]()|\\^$&")


@given(st.lists(st.text(LETTERS, min_size=1), min_size=1, max_size=5))
def test_any_words_of_a_file_are_found_as_they_are(words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "words.txt"
        path.write_text("\n".join([*words, "banana"]), encoding="utf-8")
        scorer = started(path)
    assert score("banana", scorer) == pytest.approx(0.7)
    for word in words:
        assert score(word, scorer) >= 0.69 or not word.strip(), word
