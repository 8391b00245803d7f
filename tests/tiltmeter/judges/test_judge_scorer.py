"""One judge for scores and comparisons: the figures of both, one check at the start, the questions it says it will ask."""

import pytest

from tests.tiltmeter.scoring.fake_judge import FakeJudge
from tiltmeter.errors import UserError
from tiltmeter.judges.judge import Question, Reply
from tiltmeter.judges.judge_scorer import JudgeScorer
from tiltmeter.models.generation import Completion
from tiltmeter.scoring.scorer import Sample

SAMPLES = [
    Sample(str(i), "Why?", f"So {i}.", Completion(f"Base {i}", 2, False), Completion(f"Policy {i}", 2, False), str(i))
    for i in range(5)
]


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
