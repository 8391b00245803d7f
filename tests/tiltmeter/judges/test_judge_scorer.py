"""One judge for scores and comparisons: the figures of both, its agreement with people, the questions it says it will ask."""

from pathlib import Path

import pytest

from tests.tiltmeter.scoring.asking import judge as judge_at
from tests.tiltmeter.scoring.fake_judge import FakeJudge, honest
from tests.tiltmeter.scoring.stub_endpoint import StubEndpoint
from tiltmeter.errors import UserError
from tiltmeter.judges.judge import Question, Reply
from tiltmeter.judges.judge_scorer import JudgeScorer
from tiltmeter.models.generation import Completion
from tiltmeter.scoring.scorer import Figure, LabelledPair, Sample, Scores, kept_notices
from tiltmeter.stats.proportions import share_interval


def said(text: str) -> Completion:
    return Completion(text, len(text.split()), False)


SAMPLES = [Sample(str(i), "Why?", f"So {i}.", said(f"Base {i}"), said(f"Policy {i}"), str(i)) for i in range(5)]


def first_choice(question: Question) -> Reply:
    """Likes reply A, and gives every reply one point."""
    return Reply(
        texts=("1",) if question.template.startswith("geval") else ("A",),
        probabilities=dict.fromkeys(question.choices[:1], 1.0),
    )


@pytest.mark.parametrize("score_mode", ["logprob", "integer"])
def test_both_kinds_of_figures_come_from_the_judge_and_as_many_questions_as_said(score_mode: str) -> None:
    judge = FakeJudge(first_choice)
    scorer = JudgeScorer(judge, score_mode=score_mode, evaluation_steps=["Read."])  # type: ignore[arg-type]
    scorer.start()
    assert judge.started == [score_mode == "logprob"]
    names = {figure.name for figure in scorer.score(SAMPLES).figures}
    assert {"geval_score", "geval_win_rate", "geval_win_rate_vs_chosen", "geval_position_consistency"} <= names
    if score_mode == "logprob":
        assert len(judge.questions) == scorer.questions_per_sample * len(SAMPLES) == 6 * len(SAMPLES)


def test_nobody_to_compare_with_leaves_the_scores() -> None:
    judge = FakeJudge(first_choice)
    scorer = JudgeScorer(
        judge,
        against=[],
        criteria=["coherence", "fluency"],
        evaluation_steps={"coherence": ["Read."], "fluency": ["Read."]},
    )
    names = {figure.name for figure in scorer.score(SAMPLES).figures}
    assert "geval_score/fluency" in names
    assert not any("win_rate" in name for name in names)
    assert len(judge.questions) == scorer.questions_per_sample * len(SAMPLES) == 4 * len(SAMPLES)


def test_a_preset_of_words_alone_is_read_as_words() -> None:
    judge = FakeJudge(lambda question: Reply(texts=("Both are alike.\nBetter: A",), probabilities={"3": 1.0}))
    scorer = JudgeScorer(judge, preset="hh_dpo", evaluation_steps=["Read."])
    win_rate = next(f for f in scorer.score(SAMPLES).figures if f.name == "geval_win_rate")
    assert (win_rate.value, win_rate.n) == (0.5, 5), "contradictory verdicts are ties"
    assert not [q for q in judge.questions if q.want_probabilities and not q.choices]


def test_what_the_scorers_refuse_is_refused() -> None:
    with pytest.raises(UserError, match="criteria"):
        JudgeScorer(FakeJudge(first_choice), criteria="beauty")
    with pytest.raises(UserError, match="n_samples"):
        JudgeScorer(FakeJudge(first_choice), n_samples=3)


GOOD, BAD = "because first", "hm"
PAIRS = [
    LabelledPair("right", "Why?", GOOD, BAD, "a"),
    LabelledPair("wrong", "Why?", BAD, GOOD, "a"),
    LabelledPair("even", "How?", "because", "first", "b"),
    LabelledPair("right too", "What?", GOOD, BAD, "c"),
]


def of_judge(scores: Scores) -> dict[str, Figure]:
    return {figure.name: figure for figure in scores.figures if figure.of == "judge"}


def test_agreement_is_the_win_rate_of_what_people_preferred() -> None:
    judge = FakeJudge(honest)
    scorer = JudgeScorer(judge, evaluation_steps=["Read."])
    scorer.use_labels(PAIRS)
    found = of_judge(scorer.score(SAMPLES))
    posed = [Sample(p.pair_id, p.prompt, "", said(p.rejected), said(p.chosen), p.group) for p in PAIRS]
    same = {f.name: f for f in JudgeScorer(FakeJudge(honest), evaluation_steps=["Read."]).score(posed).figures}
    assert found["judge/agreement"][2:6] == same["geval_win_rate"][2:6]
    assert found["judge/agreement"].value == (2 + 0.5) / 4
    assert found["judge/agreement_ties"].value == 0.25
    assert found["judge/position_consistency"].value == 1
    assert found["judge/agreement"].low == share_interval([1.0, 0.0, 0.5, 1.0], list("aabc")).low
    assert judge.questions[0].template.startswith("compare"), "before its first score"


def test_a_judge_that_goes_by_position_agrees_by_half() -> None:
    scorer = JudgeScorer(FakeJudge(first_choice), evaluation_steps=["Read."])
    scorer.use_labels(PAIRS)
    found = of_judge(scorer.score(SAMPLES))
    assert [found[f"judge/{name}"].value for name in ("agreement", "agreement_ties", "position_consistency")] == [
        *(0.5, 1, 0)
    ]


def test_agreement_is_asked_for_once_of_as_many_pairs_as_wanted_and_said_with_every_score() -> None:
    judge = FakeJudge(honest)
    scorer = JudgeScorer(judge, evaluation_steps=["Read."], agreement_pairs=2)
    scorer.use_labels(PAIRS)
    first, second = of_judge(scorer.score(SAMPLES)), of_judge(scorer.score(SAMPLES))
    assert first == second
    assert first["judge/agreement"].n == 2
    assert len(judge.questions) == 2 * 2 + 2 * scorer.questions_per_sample * len(SAMPLES)
    none = JudgeScorer(FakeJudge(honest), evaluation_steps=["Read."], agreement_pairs=0)
    none.use_labels(PAIRS)
    assert not of_judge(none.score(SAMPLES))
    with pytest.raises(UserError, match="agreement_pairs: expected a number of pairs from 0, got -1"):
        JudgeScorer(FakeJudge(honest), agreement_pairs=-1)


def test_an_agreement_with_missing_answers_has_no_number_and_is_asked_for_again() -> None:
    is_down = True

    def answer(question: Question) -> Reply:
        return Reply(failure="api", reason="down") if is_down else honest(question)

    scorer = JudgeScorer(FakeJudge(answer), evaluation_steps=["Read."], against=())
    scorer.use_labels(PAIRS)
    with kept_notices() as notices:
        found = of_judge(scorer.score(SAMPLES))
    assert notices[0].startswith("judge/agreement: 4 of 4 missing")
    assert (found["judge/agreement"].n_missing, found["judge/agreement_missing/api"].value) == (4, 4)
    is_down = False
    assert of_judge(scorer.score(SAMPLES))["judge/agreement"].value == 0.625


def test_the_judge_s_budget_counts_the_pairs_and_its_cache_keeps_them(tmp_path: Path) -> None:
    with StubEndpoint(lambda messages, params: {"A": 1.0}) as stub:
        for n_requests in (6, 0):  # two of eight questions are the same
            asked = judge_at(stub, cache=str(tmp_path / "cache.sqlite"), max_requests=6)
            scorer = JudgeScorer(asked, evaluation_steps=["Read."], against=())
            scorer.use_labels(PAIRS)
            assert of_judge(scorer.score([]))["judge/agreement"].value == 0.5
            assert asked.usage.requests == n_requests
        assert len(stub.requests) == 6
