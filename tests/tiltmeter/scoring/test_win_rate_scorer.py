import math
from typing import Any

import pytest

from tests.tiltmeter.scoring.fake_judge import FakeJudge, answered, honest, material, quality, sample
from tiltmeter.errors import UserError
from tiltmeter.judges.judge import Question, Reply
from tiltmeter.scoring.scorer import Figure, Sample, Scores
from tiltmeter.scoring.win_rate import PRESETS, Comparison, Verdict, WinRateScorer, compare

GOOD, BAD = "because first", "hm"
SAMPLES = [
    sample("won", GOOD, BAD, chosen=BAD),
    sample("lost", BAD, GOOD, chosen=GOOD),
    sample("even", "because", "then", chosen=GOOD),
    sample("same", " equal ", "equal", chosen=BAD),
    sample("empty", "", GOOD, chosen=BAD),
]


def scored(answer: Any = honest, samples: list[Sample] | None = None, **options: Any) -> tuple[Scores, FakeJudge]:
    judge = FakeJudge(answer)
    scorer = WinRateScorer(judge, **options)
    scorer.start()
    return scorer.score(SAMPLES if samples is None else samples), judge


def figure(scores: Scores, name: str, of: str = "both") -> Figure:
    (found,) = [figure for figure in scores.figures if (figure.name, figure.of) == (name, of)]
    return found


def always_first(question: Question) -> Reply:
    return answered(question, "A")


def test_an_honest_judge_by_hand() -> None:
    scores, judge = scored()
    assert scores.columns["geval_win"] == [1, 0, 0.5, 0.5, 0]
    assert scores.columns["geval_win_vs_chosen"] == [1, 0, 0, 0.5, 0.5]
    assert figure(scores, "geval_win_rate").value == pytest.approx(0.4)
    assert figure(scores, "geval_win_rate_vs_chosen").value == pytest.approx(0.4)
    assert figure(scores, "geval_win_rate_ties").value == pytest.approx(0.4)
    assert figure(scores, "geval_position_consistency").value == 1
    assert figure(scores, "geval_first_position_rate").value == 0.5
    assert figure(scores, "geval_win_rate_identical").value == pytest.approx(0.2)
    assert figure(scores, "geval_empty", "policy").value == pytest.approx(0.2)
    assert figure(scores, "geval_empty", "base").value == 0
    assert len(judge.questions) == 2 * 4 + 2 * 5


@pytest.mark.parametrize(("preset", "mode"), [("plain", "logprob"), ("plain", "text"), ("hh_dpo", "text")])
def test_every_preset_asks_both_orders_of_each_pair(preset: Any, mode: Any) -> None:
    scores, judge = scored(samples=SAMPLES[:2], preset=preset, verdict_mode=mode, against="base")
    assert scores.columns["geval_win"] == [1, 0]
    shown = [(material(q).texts["reply A"], material(q).texts["reply B"]) for q in judge.questions]
    assert sorted(shown) == sorted([(GOOD, BAD), (BAD, GOOD)] * 2)
    assert {q.want_probabilities for q in judge.questions} == {mode == "logprob"}
    assert judge.started == [mode == "logprob"]


def test_a_judge_that_only_sees_positions_finds_ties() -> None:
    scores, _ = scored(always_first, against="base")
    assert scores.columns["geval_win"] == [0.5] * 5
    assert scores.columns["geval_consistent"] == pytest.approx([0, 0, 0, math.nan, 0], nan_ok=True)
    assert figure(scores, "geval_position_consistency").value == 0
    assert figure(scores, "geval_first_position_rate").value == 1


def test_a_win_and_a_tie_are_a_tie() -> None:
    """As in MT-bench: what the two orders don't agree on is no win."""

    def answer(question: Question) -> Reply:
        return answered(question, "A" if material(question).texts["reply A"] == GOOD else "C")

    scores, _ = scored(answer, SAMPLES[:1], against="base")
    assert scores.columns["geval_win"] == [0.5]


@pytest.mark.parametrize("failing_order", [GOOD, BAD])
@pytest.mark.parametrize("kind", ["api", "timeout", "budget"])
def test_a_pair_without_both_answers_is_missing(failing_order: str, kind: Any) -> None:
    def answer(question: Question) -> Reply:
        is_failing = material(question).texts["reply A"] == failing_order
        return Reply(failure=kind, reason="gone") if is_failing else honest(question)

    with pytest.warns(UserWarning, match=f"geval_win_rate: 1 of 1 missing.*{kind}: gone"):
        scores, _ = scored(answer, SAMPLES[:1], against="base")
    assert math.isnan(scores.columns["geval_win"][0])
    found = figure(scores, "geval_win_rate")
    assert math.isnan(found.value)
    assert (found.n, found.n_missing) == (0, 1)
    assert figure(scores, f"geval_win_rate_missing/{kind}").value == 1
    assert math.isnan(figure(scores, "geval_position_consistency").value)


@pytest.mark.parametrize("text", ["", "Both are fine.", "A or B", "[[A]]", "A\nB is close", "Better: A, clearly", "a"])
def test_words_that_are_no_verdict_are_missing_after_one_more_question(text: str) -> None:
    with pytest.warns(UserWarning, match="parse"):
        scores, judge = scored(
            lambda _: Reply(texts=(text,)), SAMPLES[:1], against="base", preset="hh_dpo", verdict_mode="text"
        )
    assert len(judge.questions) == 4
    assert figure(scores, "geval_win_rate_missing/parse").value == 1


def test_a_verdict_is_the_last_line_whatever_comes_before() -> None:
    def answer(question: Question) -> Reply:
        verdict = "A" if material(question).texts["reply A"] == GOOD else "B"
        other = "BA"[verdict == "B"]
        return Reply(texts=(f"Comparison: at first sight, better: {other}\nBetter: {other}\n\nBetter: {verdict}\n",))

    scores, _ = scored(answer, SAMPLES[:2], against="base", preset="hh_dpo", verdict_mode="text")
    assert scores.columns["geval_win"] == [1, 0]


def test_the_likeliest_letter_is_the_verdict_and_equal_ones_are_a_tie() -> None:
    def answer(question: Question) -> Reply:
        a, b = (quality(material(question).texts[label]) for label in ("reply A", "reply B"))
        return Reply(probabilities={"A": 0.1 * a, "B": 0.1 * b, "C": 0.05})

    scores, _ = scored(answer, against="base")
    assert scores.columns["geval_win"] == [1, 0, 0.5, 0.5, 0]
    assert figure(scores, "geval_win_rate_low_mass").value == 1, "four points and the tie in each pair: .45"


def test_a_length_bias_is_seen_in_the_raw_rate_and_taken_out_of_the_controlled_one() -> None:
    def longer_wins(question: Question) -> Reply:
        texts = material(question).texts
        return answered(question, "A" if len(texts["reply A"]) > len(texts["reply B"]) else "B")

    samples = [sample(str(i), "x" * (100 + (i * 37) % 60), "y" * 110) for i in range(200)]
    scores, _ = scored(longer_wins, [s for s in samples if len(s.policy.text) != 110], against="base")
    assert figure(scores, "geval_win_rate").value > 0.75
    controlled = figure(scores, "geval_win_rate_length_controlled")
    assert controlled.low <= 0.5 <= controlled.high
    assert figure(scores, "geval_win_rate_length_difference").value == pytest.approx(19.5, abs=1)


def test_which_order_is_asked_first_is_drawn_for_each_pair() -> None:
    def firsts(seed: int) -> list[bool]:
        verdicts = compare(
            FakeJudge(honest),
            [Comparison(str(i), "p", GOOD, BAD) for i in range(60)],
            preset=PRESETS["plain"],
            mode="text",
            criterion="c",
            meaning="m",
            seed=seed,
        )
        assert all({j.candidate_is_first for j in verdict.judgements} == {True, False} for verdict in verdicts)
        return [verdict.judgements[0].candidate_is_first for verdict in verdicts]

    assert firsts(0) == firsts(0) != firsts(1)
    assert 15 < sum(firsts(0)) < 45


def test_nothing_asked_is_a_tie() -> None:
    assert Verdict(()).value == 0.5
    assert Verdict(()).failed is None


def test_scorers_with_prefixes_stand_side_by_side() -> None:
    both = [scored(prefix=prefix)[0] for prefix in ("geval", "harmless")]
    keys = [(figure.name, figure.of) for scores in both for figure in scores.figures]
    assert len(set(keys)) == len(keys)
    assert not set(both[0].columns) & set(both[1].columns)


def test_every_figure_of_a_comparison_says_what_made_it() -> None:
    makers = set()
    for options in [
        {},
        {"verdict_mode": "text"},
        {"criterion": "harmlessness"},
        {"criterion": {"helpfulness": "?"}},
        {"seed": 1},
    ]:
        scores, _ = scored(against="base", **options)
        (maker,) = {figure.scorer for figure in scores.figures if figure.of == "both"}
        makers.add(maker)
    assert len(makers) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "hh_dpo"}, r"verdict_mode: preset hh_dpo needs text, got 'logprob'"),
        ({"against": []}, r"against: expected base or chosen or both"),
        ({"against": ["base", "base"]}, r"against: expected base or chosen or both"),
        ({"criterion": "charm"}, r"criterion: expected some of"),
        ({"criterion": {"a": "?", "b": "!"}}, r"criterion: expected one criterion, got a, b"),
        ({"prefix": "a/b"}, r"prefix: expected letters"),
        ({"max_missing_rate": -0.1}, r"^max_missing_rate"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WinRateScorer(FakeJudge(honest), **options)
