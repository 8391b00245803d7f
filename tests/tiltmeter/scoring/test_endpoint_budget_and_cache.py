"""What a judge costs: nothing twice, and never more than was allowed."""

from typing import Any

import pytest

from tests.tiltmeter.scoring.asking import judge, question
from tests.tiltmeter.scoring.stub_endpoint import StubEndpoint, slow, status
from tiltmeter.judges.endpoint_judge import EndpointJudge
from tiltmeter.judges.judge import ChatMessage


def test_cached_answers_need_no_endpoint_and_no_budget(tmp_path: Any) -> None:
    cache = str(tmp_path / "deep" / "cache.sqlite")
    with StubEndpoint(lambda messages, params: {"4": 0.6, " 5": 0.3}) as stub:
        questions = [
            question(want_probabilities=True),
            question(n_samples=3, temperature=1.0),
            question(n_samples=2, temperature=1.0),
            question(template="t2"),
        ]
        first = judge(stub, cache=cache).ask(questions)
        assert len(stub.requests) == 4
        again = judge(stub, cache=cache, max_requests=1)
        again._budget.usage.requests = 1
        assert again.ask(questions + questions) == first * 2
        assert (len(stub.requests), again.usage.cached) == (4, 4)
        (reply,) = again.ask([question("new")])
        assert reply.failure == "budget"


@pytest.mark.parametrize(
    "change",
    [
        {"template": "t2"},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"max_tokens": 3},
        {"n_samples": 2},
        {"choices": ("A", "B")},
        {"want_probabilities": True},
        {"messages": (ChatMessage("system", "Is it good?"),)},
    ],
)
def test_another_question_is_another_entry(change: dict[str, Any], tmp_path: Any) -> None:
    with StubEndpoint() as stub:
        asked = judge(stub, cache=str(tmp_path / "cache.sqlite"))
        asked.ask([question()])
        asked.ask([question(**change)])
        assert len(stub.requests) == 2


def test_another_model_body_or_address_is_another_entry(tmp_path: Any) -> None:
    cache = str(tmp_path / "cache.sqlite")
    with StubEndpoint(models=["stub", "other"]) as stub, StubEndpoint() as elsewhere:
        judge(stub, cache=cache).ask([question()])
        EndpointJudge("other", base_url=stub.base_url, allow_local=True, cache=cache).ask([question()])
        judge(stub, cache=cache, extra_body={"seed": 1}).ask([question()])
        judge(elsewhere, cache=cache).ask([question()])
        assert (len(stub.requests), len(elsewhere.requests)) == (3, 1)


def test_failures_are_asked_again(tmp_path: Any) -> None:
    with StubEndpoint(faults=[status(400), None]) as stub:
        asked = judge(stub, cache=str(tmp_path / "cache.sqlite"))
        assert [asked.ask([question()])[0].failure for _ in range(3)] == ["api", None, None]
        assert len(stub.requests) == 2


def test_requests_stop_before_the_budget_is_exceeded_and_what_came_is_kept() -> None:
    with StubEndpoint() as stub:
        asked = judge(stub, max_requests=5)
        replies = asked.ask([question(str(i)) for i in range(9)])
        assert [reply.failure for reply in replies].count("budget") == 4
        assert len(stub.requests) == asked.usage.requests == 5
        assert "max_requests=5" in next(reply.reason for reply in replies if reply.failure)


def test_retries_are_paid_from_the_same_budget() -> None:
    with StubEndpoint(always=status(500)) as stub:
        asked = judge(stub, max_requests=3)
        replies = asked.ask([question()]) + asked.ask([question()])
        assert [reply.failure for reply in replies] == ["api", "budget"]
        assert (len(stub.requests), asked.usage.requests, asked.usage.retries) == (3, 3, 2)


def test_tries_before_the_answer_are_booked_at_the_most_they_can_have_used() -> None:
    with StubEndpoint(faults=[status(500)]) as stub:
        asked = judge(stub, max_tokens=10**6)
        asked.ask([question("12")])
        assert (asked.usage.prompt_tokens, asked.usage.completion_tokens) == (82 + 10, 16 + 1)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_token_budget_holds_and_does_not_depend_on_concurrency(concurrency: int) -> None:
    """A question may use 80 + 1 + 16 = 97 tokens and uses 11: the sixth request fits in 160, the seventh might not."""
    with StubEndpoint(always=slow(0.02)) as stub:
        asked = judge(stub, max_tokens=160, concurrency=concurrency)
        replies = asked.ask([question(str(i)) for i in range(9)])
        assert [reply.failure for reply in replies].count(None) == len(stub.requests) == 6
        assert (asked.usage.prompt_tokens, asked.usage.completion_tokens) == (60, 6)


def test_the_money_budget() -> None:
    """10 and 1 tokens at 1000 and 10000 dollars a million: 2 cents a request; up to 97 and 160 to be sure beforehand."""
    with StubEndpoint() as stub:
        prices = {"input": 1000.0, "output": 10000.0}
        asked = judge(stub, max_usd=0.3, prices=prices)
        replies = asked.ask([question(str(i)) for i in range(9)])
        assert [reply.failure for reply in replies].count(None) == 3
        assert asked.usage.usd == pytest.approx(0.06)
        assert judge(stub).usage.usd is None


def test_a_server_that_counts_nothing_is_charged_the_most_it_can_have_used() -> None:
    with StubEndpoint(usage=None) as stub:
        asked = judge(stub)
        asked.ask([question("12")])
        assert (asked.usage.prompt_tokens, asked.usage.completion_tokens) == (82, 16)
