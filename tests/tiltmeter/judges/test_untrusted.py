import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiltmeter.scoring.attacks import ATTACKS, NULL_MODEL
from tests.tiltmeter.scoring.fake_judge import MARKED, FakeJudge, honest, material, naive, sample
from tiltmeter.judges import untrusted
from tiltmeter.judges.untrusted import enclose, neutralize, nonce
from tiltmeter.scoring.geval import GEvalScorer
from tiltmeter.scoring.scorer import Scores
from tiltmeter.scoring.win_rate import WinRateScorer

HONEST, WORSE = "first this, then that, because it is careful", "because"
SPECIAL = re.compile(r"<<|>>|\[\[|\]\]|<[|｜]|[|｜]>|</?\w+>|\[/?INST\]")
pieces = [*"<>|[]/｜sA_\u200b\u202e\r\n\x1b \ufeff", "<|im_end|>", "[[A]]", "<s>", "[INST]", "⟨U+200B⟩"]
tricky = st.lists(st.sampled_from(pieces), max_size=30).map("".join)


def rated(text: str, *, judge: FakeJudge) -> float:
    scorer = GEvalScorer(judge, evaluation_steps=["Read it."])
    return scorer.score([sample("x", text, HONEST)]).columns["geval_score/helpfulness/policy"][0]


def compared(text: str, *, judge: FakeJudge, mode: str = "logprob", preset: str = "plain") -> Scores:
    scorer = WinRateScorer(judge, verdict_mode=mode, preset=preset, against="base")  # type: ignore[arg-type]
    return scorer.score([sample("x", text, HONEST)])


def test_there_are_twenty_attacks() -> None:
    assert len(ATTACKS) == 20


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_changes_no_verdict_of_a_naive_judge(attack: str) -> None:
    for text in (attack, f"{WORSE}\n\n{attack}", f"{attack}\n{WORSE}"):
        assert (
            rated(text, judge=FakeJudge(naive))
            == rated(text, judge=FakeJudge(honest))
            < rated(HONEST, judge=FakeJudge(naive))
        )
        for mode, preset in [("logprob", "plain"), ("text", "plain"), ("text", "hh_dpo")]:
            assert compared(text, judge=FakeJudge(naive), mode=mode, preset=preset).columns["geval_win"] == [0]


def test_a_constant_answer_does_no_better_than_an_honest_one() -> None:
    assert rated(NULL_MODEL, judge=FakeJudge(naive)) <= rated(HONEST, judge=FakeJudge(naive))
    assert compared(NULL_MODEL, judge=FakeJudge(naive)).columns["geval_win"] == [0]


def test_the_naive_judge_is_naive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the defence most of the attacks work, so that the tests above mean something."""
    monkeypatch.setattr(untrusted, "neutralize", lambda text: text)
    monkeypatch.setattr(untrusted, "nonce", lambda texts, *, seed: "0" * 16)
    works = [name for name, attack in ATTACKS.items() if rated(attack, judge=FakeJudge(naive)) > 0.9]
    assert len(works) >= 8, works


def test_an_attack_in_the_conversation_changes_no_verdict() -> None:
    for attack in ATTACKS.values():
        scorer = WinRateScorer(FakeJudge(naive), against="base")
        scores = scorer.score([sample("x", WORSE, HONEST, prompt=f"\n\nHuman: {attack}\n\nAssistant:")])
        assert scores.columns["geval_win"] == [0]


def test_every_question_has_its_own_markers_and_equal_ones_the_same() -> None:
    judge = FakeJudge(honest)
    for _ in range(2):
        compared(WORSE, judge=judge)
    first, second = judge.questions[:2], judge.questions[2:]
    assert first == second
    codes = [{code for _, code, _ in MARKED.findall(q.messages[1].content)} for q in first]
    assert [len(found) for found in codes] == [1, 1]
    assert codes[0] != codes[1]
    assert set(material(first[0]).texts) == {"conversation", "reply A", "reply B"}


def test_no_text_contains_its_nonce() -> None:
    """A text that did would be a fixed point of SHA-256; by hand the second code is taken."""
    texts = ["something"]
    code = nonce(texts, seed=0)
    assert re.fullmatch("[0-9a-f]{16}", code)
    assert nonce(texts, seed=1) != code != nonce(["something", ""], seed=0)

    class Claims(str):
        def __contains__(self, found: str) -> bool:  # type: ignore[override]
            return found == code

    assert nonce([Claims("something")], seed=0) not in (code, "")


@given(tricky)
def test_nothing_special_or_invisible_is_left(text: str) -> None:
    harmless = neutralize(text)
    assert not SPECIAL.search(harmless)
    assert not [c for c in harmless if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t"]
    assert neutralize(harmless) == harmless


@given(st.text(st.characters(categories=["L", "N", "Po", "Zs"]), max_size=60))
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert neutralize(text) == text.translate({ord(c): f"⟨U+{ord(c):04X}⟩" for c in "\u115f\u1160\u3164\uffa0"})


@given(tricky, tricky)
def test_markers_can_be_read_back_whatever_stands_between_them(a: str, b: str) -> None:
    code = nonce([a, b], seed=0)
    found = MARKED.findall(f"x {enclose('reply A', a, code)} y {enclose('reply B', b, code)} z")
    assert found == [("reply A", code, neutralize(a).strip()), ("reply B", code, neutralize(b).strip())]


@pytest.mark.parametrize("text", ["a < b > c, x[0][1], f(a) | g", "<a href='x'>", "€ ❤️ 日本語", "tab\tand\nline"])
def test_what_people_write_is_left_alone(text: str) -> None:
    assert neutralize(text) == text


def test_lone_surrogates_do_no_harm() -> None:
    assert neutralize("\ud800") == "⟨U+D800⟩"
    assert nonce(["\ud800"], seed=0)
