import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.tiltmeter.scoring.fake_judge import FakeJudge, answered, honest, is_about_steps, material, sample, steps
from tiltmeter.errors import UserError
from tiltmeter.judges.judge import Question, Reply
from tiltmeter.judges.prompts import STEPS
from tiltmeter.scoring.geval import GEvalScorer
from tiltmeter.scoring.scorer import Figure, Sample, Scores

STEP_LIST = ["Read it.", "Rate it."]
SAMPLES = [
    sample("a", "first this, then that, because it is careful", "no"),
    sample("b", "because", "first one"),
    sample("c", "", "then"),
]


def scored(reply: Reply, samples: list[Sample] | None = None, **options: Any) -> tuple[Scores, FakeJudge]:
    judge = FakeJudge(lambda _: reply)
    scorer = GEvalScorer(judge, evaluation_steps=STEP_LIST, **options)
    scorer.start()
    return scorer.score(SAMPLES if samples is None else samples), judge


def figure(scores: Scores, name: str, of: str = "policy") -> Figure:
    (found,) = [figure for figure in scores.figures if (figure.name, figure.of) == (name, of)]
    return found


def test_a_score_is_the_expectation_over_the_five_points() -> None:
    """(1·.1 + 3·.2 + 4·.4 + 5·.1) / .8 = 2.8 / .8 = 3.5, on [0, 1]: .625; what other tokens got (.2) counts for nothing."""
    probabilities = {"1": 0.1, "2": 0.0, "3": 0.2, "4": 0.4, "5": 0.1, "the": 0.2}
    scores, judge = scored(Reply(probabilities=probabilities))
    assert scores.columns["geval_score/helpfulness/policy"] == pytest.approx([0.625] * 3)
    assert scores.columns["geval_mass/helpfulness/base"] == pytest.approx([0.8] * 3)
    assert figure(scores, "geval_score/helpfulness").value == pytest.approx(0.625)
    assert figure(scores, "geval_low_mass/helpfulness").value == 0
    assert all(
        q.want_probabilities and q.choices == ("1", "2", "3", "4", "5") and q.max_tokens == 1 for q in judge.questions
    )
    assert len(judge.questions) == 6


def test_little_mass_on_the_points_is_scored_and_flagged() -> None:
    scores, _ = scored(Reply(probabilities={"4": 0.2, "2": 0.2}))
    assert scores.columns["geval_score/helpfulness/policy"] == pytest.approx([0.5] * 3)
    assert figure(scores, "geval_low_mass/helpfulness").value == 1


def test_samples_that_can_not_be_read_are_nothing_rather_than_zero() -> None:
    """Two of four samples: 5 and 4, mean 4.5, on [0, 1]: .875."""
    scores, judge = scored(Reply(texts=("5", "no idea", "Score: 4.", "")), score_mode="sample", n_samples=4)
    assert scores.columns["geval_score/helpfulness/policy"] == [0.875] * 3
    assert scores.columns["geval_mass/helpfulness/policy"] == [0.5] * 3
    assert {(q.n_samples, q.temperature, q.want_probabilities) for q in judge.questions} == {(4, 1.0, False)}


@pytest.mark.parametrize(
    ("text", "score"), [("4", 0.75), ("- Helpfulness (1-5): 2", 0.25), ("It is fine.\n**Score: 5**", 1.0)]
)
def test_an_integer_is_the_last_line(text: str, score: float) -> None:
    scores, judge = scored(Reply(texts=(text,)), score_mode="integer")
    assert scores.columns["geval_score/helpfulness/policy"] == [score] * 3
    assert {q.temperature for q in judge.questions} == {0.0}


@pytest.mark.parametrize("text", ["", "6", "0", "10", "4 or 5", "Score: 5\nNo, wait", "4/5", "3.5", "five"])
@pytest.mark.parametrize("mode", ["integer", "sample"])
def test_what_is_no_score_is_asked_once_more_and_then_missing(text: str, mode: str) -> None:
    with pytest.warns(UserWarning, match=r"geval_score/helpfulness of \w+: 3 of 3 missing.*parse"):
        scores, judge = scored(Reply(texts=(text,)), score_mode=mode)
    assert len(judge.questions) == 12
    assert len(set(judge.questions)) == 12, "the second time in other words: a cache must not answer"
    found = figure(scores, "geval_score/helpfulness")
    assert math.isnan(found.value)
    assert (found.n, found.n_missing) == (0, 3)
    assert figure(scores, "geval_score/helpfulness_missing/parse").value == 3
    assert all(math.isnan(score) for score in scores.columns["geval_score/helpfulness/policy"])


def test_a_second_answer_that_can_be_read_counts() -> None:
    def answer(question: Question) -> Reply:
        return Reply(texts=("2" if "alone" in question.messages[-1].content else "hm",))

    scorer = GEvalScorer(FakeJudge(answer), evaluation_steps=STEP_LIST, score_mode="integer")
    assert scorer.score(SAMPLES).columns["geval_score/helpfulness/base"] == [0.25] * 3


def test_no_probabilities_are_missing_scores_never_integers() -> None:
    with pytest.warns(UserWarning, match="the judge gave no probabilities"):
        scores, judge = scored(Reply(texts=("5",)))
    assert figure(scores, "geval_score/helpfulness_missing/api").value == 3
    assert len(judge.questions) == 6, "no re-ask: it would say the same"


@pytest.mark.parametrize(("n_failed", "is_number"), [(1, True), (2, False)])
def test_more_than_five_percent_missing_is_no_figure(n_failed: int, is_number: bool) -> None:
    def answer(question: Question) -> Reply:
        fails = any(f"#{i}." in material(question).texts["reply"] for i in range(n_failed))
        return Reply(failure="timeout", reason="slow") if fails else answered(question, "4")

    samples = [sample(str(i), f"#{i}.", "base") for i in range(20)]
    scorer = GEvalScorer(FakeJudge(answer), evaluation_steps=STEP_LIST)
    if is_number:
        scores = scorer.score(samples)
    else:
        with pytest.warns(
            UserWarning, match="2 of 20 missing, more than 5%, so the figure is NaN; most often timeout: slow"
        ):
            scores = scorer.score(samples)
    found = figure(scores, "geval_score/helpfulness")
    assert math.isnan(found.value) != is_number
    assert (found.n, found.n_missing) == (20 - n_failed, n_failed)
    assert figure(scores, "geval_score/helpfulness_missing/timeout").value == n_failed
    assert figure(scores, "geval_score/helpfulness", "base").n == 20


def test_the_difference_is_paired() -> None:
    """Policy 5, 2, 1 and base 1, 2, 2 (words of an honest judge): on [0, 1] 1, .25, 0 less 0, .25, .25."""
    scorer = GEvalScorer(FakeJudge(honest), score_mode="integer")
    scorer.start()
    scores = scorer.score(SAMPLES)
    assert scores.columns["geval_score/helpfulness/policy"] == [1.0, 0.25, 0.0]
    assert scores.columns["geval_score/helpfulness/base"] == [0.0, 0.25, 0.25]
    assert figure(scores, "geval_score_difference/helpfulness", "both").value == pytest.approx(0.25)


def test_several_criteria_and_own_ones() -> None:
    judge = FakeJudge(honest)
    scorer = GEvalScorer(judge, criteria={"kindness": "Is it kind?", "brevity": "Is it short?"})
    scorer.start()
    scores = scorer.score(SAMPLES[:1])
    assert [q.messages[1].content.count("Is it kind?") for q in judge.questions if is_about_steps(q)] == [1, 0]
    assert {"geval_score/kindness", "geval_score/brevity"} <= {figure.name for figure in scores.figures}
    prompts = [q.messages[1].content for q in judge.questions if not is_about_steps(q)]
    assert all("1. Look at part 1.\n2. Look at part 2." in prompt for prompt in prompts)


def test_every_figure_says_what_made_it() -> None:
    texts = set()
    for options in [{}, {"score_mode": "integer"}, {"score_mode": "sample", "n_samples": 3}, {"seed": 1}]:
        scores, _ = scored(Reply(texts=("4",), probabilities={"4": 1.0}), **options)
        found = {figure.scorer for figure in scores.figures}
        assert all("fake@here" in text for text in found)
        texts |= found
    assert len(texts) == 8  # of the criterion by its steps, and of the mean over criteria


def test_the_score_is_the_mean_over_criteria_and_missing_where_one_is() -> None:
    """5 points on one criterion are 1, 3 on the other ½: ¾; without an answer on the other there is no mean."""

    def answer(question: Question) -> Reply:
        if "brevity" in material(question).rest:
            return replies.pop(0)
        return Reply(probabilities={"5": 1.0})

    criteria, steps = {"truth": "It is true.", "brevity": "It is short."}, {"truth": ["Read."], "brevity": ["Read."]}
    for last, expected in ((Reply(probabilities={"3": 1.0}), 0.75), (Reply(failure="api", reason="down"), math.nan)):
        replies = [Reply(probabilities={"3": 1.0})] * 5 + [last] * 9
        scorer = GEvalScorer(FakeJudge(answer), criteria=criteria, evaluation_steps=steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = figure(scorer.score(SAMPLES), "geval_score", "base")
        assert found.value == pytest.approx(expected, nan_ok=True)
        assert (found.n, found.n_missing) == ((3, 0) if expected == 0.75 else (2, 1))


def test_nothing_to_score_is_no_figure() -> None:
    scores, judge = scored(Reply(), [])
    assert not judge.questions
    assert all(math.isnan(figure.value) for figure in scores.figures)


# --- evaluation steps ---


def test_steps_are_written_once_and_kept_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "steps.json"
    first, second = FakeJudge(honest), FakeJudge(honest)
    for judge in (first, second):
        scorer = GEvalScorer(judge, criteria=["helpfulness", "coherence"], steps_file=str(file))
        scorer.start()
        scorer.score(SAMPLES)
        scorer.score(SAMPLES)
    assert sum(map(is_about_steps, first.questions)) == 2
    assert not any(map(is_about_steps, second.questions))
    kept = json.loads(file.read_text())
    assert kept["coherence"]["steps"] == ["Look at part 1.", "Look at part 2."]
    assert kept["coherence"]["judge"] == "fake@here"
    assert kept["coherence"]["template"] == STEPS.id


def test_a_file_gains_criteria_and_loses_none(tmp_path: Path) -> None:
    file = tmp_path / "steps.json"
    for criterion in ("helpfulness", "coherence"):
        GEvalScorer(FakeJudge(honest), criteria=criterion, steps_file=str(file)).start()
    assert set(json.loads(file.read_text())) == {"helpfulness", "coherence"}


@pytest.mark.parametrize("changed", ["judge", "template", "text"])
def test_steps_of_another_judge_template_or_criterion_are_refused(tmp_path: Path, changed: str) -> None:
    file = tmp_path / "steps.json"
    GEvalScorer(FakeJudge(honest), steps_file=str(file)).start()
    content = json.loads(file.read_text())
    content["helpfulness"][changed] = "another"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"steps\.json: steps for helpfulness: expected {changed} .*got 'another'"):
        GEvalScorer(FakeJudge(honest), steps_file=str(file)).start()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"helpfulness": {}}',
        '{"helpfulness": 3}',
        '{"helpfulness": {"steps": "x"}}',
        '{"helpfulness": {"steps": []}}',
    ],
)
def test_a_damaged_file_of_steps_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "steps.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"steps\.json: expected evaluation steps"):
        GEvalScorer(FakeJudge(honest), steps_file=str(file)).start()


def test_a_judge_that_is_down_at_the_start_is_asked_again_for_its_steps() -> None:
    is_down = True

    def answer(question: Question) -> Reply:
        return Reply(failure="api", reason="refused") if is_down else honest(question)

    scorer = GEvalScorer(FakeJudge(answer))
    with pytest.warns(UserWarning, match=r"no evaluation steps for helpfulness from fake@here \(api: refused\)"):
        scorer.start()
    with pytest.warns(UserWarning, match="no evaluation steps|missing"):
        scores = scorer.score(SAMPLES)
    assert figure(scores, "geval_score/helpfulness_missing/api").value == 3
    is_down = False
    assert figure(scorer.score(SAMPLES), "geval_score/helpfulness").n == 3


def test_steps_that_are_no_list_are_asked_for_once_more() -> None:
    replies = [Reply(texts=("Just use common sense.",)), steps(3)]
    judge = FakeJudge(lambda _: replies.pop(0))
    scorer = GEvalScorer(judge)
    scorer.start()
    assert len(scorer.steps.found["helpfulness"]) == 3
    assert judge.questions[0] != judge.questions[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criteria": "charm"}, r"criteria: expected some of helpfulness.*'charm'"),
        ({"criteria": []}, r"criteria: expected at least one"),
        ({"criteria": ["fluency", "fluency"]}, r"criteria: expected each criterion once"),
        ({"criteria": {"x": " "}}, r"criteria"),
        ({"n_samples": 5}, r"n_samples and temperature: only for score_mode=sample"),
        ({"score_mode": "sample", "n_samples": 1}, "at least 2"),
        ({"score_mode": "sample", "temperature": 0.0}, "temperature in"),
        ({"prefix": ""}, r"prefix: expected letters"),
        ({"max_missing_rate": 1.5}, r"max_missing_rate"),
        ({"evaluation_steps": ["a"], "steps_file": "x.json"}, r"steps_file: not with"),
        ({"evaluation_steps": []}, r"evaluation_steps: expected steps"),
        ({"evaluation_steps": {"fluency": ["a"]}}, r"evaluation_steps: expected steps for each of helpfulness"),
        (
            {"evaluation_steps": ["a"], "criteria": ["fluency", "coherence"]},
            r"evaluation_steps: expected criterion",
        ),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GEvalScorer(FakeJudge(honest), **options)
