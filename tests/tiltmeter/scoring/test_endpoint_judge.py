"""Everything a judge behind an address may do to a training run, from a real server: it answers, or fails in words and in time."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.tiltmeter.scoring.stub_endpoint import (
    Fault,
    StubEndpoint,
    dropped,
    empty_choices,
    html,
    refused_url,
    slow,
    status,
    truncated,
)
from tiltmeter.errors import UserError
from tiltmeter.scoring.endpoint_judge import EndpointJudge
from tiltmeter.scoring.judge import ChatMessage, Question, Reply


def question(text: str = "Is it good?", **changes: Any) -> Question:
    return replace(Question((ChatMessage("user", text),), template="t1", choices=tuple("12345")), **changes)


def judge(stub: StubEndpoint, **arguments: Any) -> EndpointJudge:
    """A judge that notes its waits instead of waiting."""
    made = EndpointJudge("stub", **{"base_url": stub.base_url, "allow_local": True, "time_limit": 20.0} | arguments)
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    made.retries = replace(made.retries, sleep=note)
    made.waits = waits  # type: ignore[attr-defined]
    return made


def echo(messages: list[dict[str, str]], params: dict[str, Any]) -> str:
    return f"about {messages[-1]['content']}"


def test_answers_in_order_and_equal_questions_once() -> None:
    with StubEndpoint(echo) as stub:
        texts = [f"q{i}" for i in range(20)] + ["q3", "q0"]
        asked = judge(stub)
        replies = asked.ask([question(text) for text in texts])
        assert replies == [Reply((f"about {text}",)) for text in texts]
        assert len(stub.requests) == asked.usage.requests == 20
        assert asked.name == f"stub@127.0.0.1:{stub.port}"


def test_what_is_sent() -> None:
    with StubEndpoint() as stub:
        messages = (ChatMessage("system", "Be fair."), ChatMessage("user", "Is it?"))
        asked = replace(question(), messages=messages, temperature=0.7, top_p=0.9, max_tokens=33)
        judge(stub, extra_body={"chat_template_kwargs": {"enable_thinking": False}}).ask([asked])
        (request,) = stub.requests
        assert request.path == "/v1/chat/completions"
        assert request.body == {
            "model": "stub",
            "messages": [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "Is it?"}],
            "temperature": 0.7,
            "top_p": 0.9,
            "max_tokens": 33,
            "chat_template_kwargs": {"enable_thinking": False},
        }


def test_probabilities_are_those_of_the_first_token_over_all_spellings() -> None:
    with StubEndpoint(
        lambda messages, params: {"4": 0.5, " 4": 0.125, "▁4": 0.0625, "Ġ5": 0.25, "The": 0.0625}
    ) as stub:
        (reply,) = judge(stub).ask([question(want_probabilities=True, max_tokens=50)])
        assert reply.probabilities == pytest.approx({"1": 0, "2": 0, "3": 0, "4": 0.6875, "5": 0.25})
        assert (reply.failure, stub.requests[0].body["max_tokens"]) == (None, 1)
        assert (stub.requests[0].body["logprobs"], stub.requests[0].body["top_logprobs"]) == (True, 20)


@pytest.mark.parametrize("log_probs", [False, "refused"])
def test_without_log_probs_there_is_a_reason_and_never_a_number(log_probs: bool | str) -> None:
    with StubEndpoint(log_probs=log_probs) as stub:
        (reply,) = judge(stub).ask([question(want_probabilities=True)])
        assert (reply.probabilities, reply.failure) == (None, "api")
        assert "judge.score_mode=sample" in reply.reason
        assert len(stub.requests) == 1, "nothing to retry"


@pytest.mark.parametrize(
    ("supports_n", "requests"), [(True, [5]), (False, [5, 4, 3, 2, None]), ("refused", [5] + [None] * 5)]
)
def test_samples_are_drawn_whatever_the_server_makes_of_n(supports_n: bool | str, requests: list[int | None]) -> None:
    count = iter(range(100))
    with StubEndpoint(lambda messages, params: str(next(count)), supports_n=supports_n) as stub:
        asked = judge(stub)
        (reply,) = asked.ask([question(n_samples=5, temperature=1.0)])
        assert reply == Reply(("0", "1", "2", "3", "4"))
        assert [request.body.get("n") for request in stub.requests] == requests
        asked.ask([question("another", n_samples=2)])
        expected = {True: [2], False: [2, None], "refused": [None, None]}[supports_n]
        assert [request.body.get("n") for request in stub.requests][len(requests) :] == expected


def test_a_server_that_insists_on_the_new_name_of_the_limit_gets_it() -> None:
    with StubEndpoint(max_tokens_name="max_completion_tokens") as stub:
        asked = judge(stub, concurrency=1)
        assert [reply.failure for reply in asked.ask([question("a", max_tokens=7), question("b", max_tokens=7)])] == [
            None
        ] * 2
        limits = [{name: value for name, value in r.body.items() if "tokens" in name} for r in stub.requests]
        assert limits == [{"max_tokens": 7}, {"max_completion_tokens": 7}, {"max_completion_tokens": 7}]


PASSING: dict[str, Callable[[], Fault]] = {
    "429": lambda: status(429),
    "408": lambda: status(408),
    "409": lambda: status(409),
    "500": lambda: status(500),
    "503": lambda: status(503),
    "html": html,
    "half a response": truncated,
    "half a response, then hung up": lambda: truncated(broken_connection=True),
    "empty choices": empty_choices,
    "hung up": dropped,
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again(name: str) -> None:
    with StubEndpoint(faults=[PASSING[name](), PASSING[name]()]) as stub:
        asked = judge(stub)
        assert asked.ask([question()]) == [Reply(("4",))]
        assert (asked.usage.requests, asked.usage.retries, len(stub.requests)) == (3, 2, 3)


@pytest.mark.parametrize("name", PASSING)
def test_what_does_not_pass_fails_after_the_last_try(name: str) -> None:
    with StubEndpoint(always=PASSING[name]()) as stub:
        asked = judge(stub, max_retries=2)
        (reply,) = asked.ask([question()])
        assert (reply.texts, reply.failure, bool(reply.reason)) == ((), "api", True)
        assert len(stub.requests) == 3


@pytest.mark.parametrize("code", [400, 404, 413, 422])
def test_what_can_not_pass_is_not_tried_again(code: int) -> None:
    with StubEndpoint(always=status(code, "the context is too long")) as stub:
        (reply,) = judge(stub).ask([question()])
        assert (reply.failure, reply.reason) == ("api", f"HTTP {code}: the context is too long")
        assert len(stub.requests) == 1


def test_a_quota_that_is_used_up_is_not_waited_for() -> None:
    with StubEndpoint(always=status(429, "no credit", code="insufficient_quota")) as stub:
        (reply,) = judge(stub).ask([question()])
        assert (reply.reason, len(stub.requests)) == ("HTTP 429: no credit", 1)


def test_waits_as_long_as_the_server_asks_else_by_chance_and_ever_longer() -> None:
    with StubEndpoint(
        faults=[status(429, retry_after="3"), status(503, retry_after="0.5"), status(429), status(429)]
    ) as stub:
        asked = judge(stub)
        asked.ask([question()])
        first, second, *drawn = asked.waits  # type: ignore[attr-defined]
        assert (first, second) == (3.0, 0.5)
        assert all(0 <= wait <= most for wait, most in zip(drawn, [2.0, 4.0], strict=True))


def test_a_wait_beyond_the_time_limit_is_not_begun() -> None:
    with StubEndpoint(always=status(429, "slow down", retry_after="3600")) as stub:
        asked = judge(stub)
        (reply,) = asked.ask([question()])
        assert reply.failure == "timeout"
        assert "HTTP 429: slow down" in reply.reason
        assert "3600 s" in reply.reason
        assert asked.waits == []  # type: ignore[attr-defined]


def test_nobody_there() -> None:
    asked = EndpointJudge("stub", base_url=refused_url(), allow_local=True, max_retries=0, max_tokens=1000)
    replies = asked.ask([question(str(i)) for i in range(20)])
    assert {reply.failure for reply in replies} == {"api"}
    assert "no connection" in replies[0].reason
    assert asked.usage.prompt_tokens == 0, "nothing was sent, so nothing is spent"


def test_a_slow_answer_is_a_timeout_and_counts_as_spent() -> None:
    with StubEndpoint(always=slow(30)) as stub:
        asked = judge(stub, request_timeout=0.1, max_retries=1)
        assert asked.ask([question()]) == [Reply(failure="timeout", reason="no answer within 0.1 s")]
        assert len(stub.requests) == 2
        assert asked.usage.prompt_tokens > 2 * len("Is it good?")


def test_after_the_time_limit_there_is_what_there_is() -> None:
    with StubEndpoint(echo, faults=[None, None], always=slow(60)) as stub:
        asked = judge(stub, time_limit=0.7, concurrency=2)
        replies = asked.ask([question(str(i)) for i in range(6)])
        assert [reply.failure for reply in replies].count("timeout") == 4
        for i, reply in enumerate(replies):
            assert reply.failure == "timeout" or reply.texts == (f"about {i}",)
        assert {reply.reason for reply in replies if reply.failure} == {"not answered within judge.time_limit"}


def test_samples_that_came_before_a_failure_are_kept() -> None:
    with StubEndpoint(supports_n=False, faults=[None, None, status(404)]) as stub:
        (reply,) = judge(stub).ask([question(n_samples=4)])
        assert (reply.texts, reply.failure) == (("4", "4"), "api")


def test_an_answer_without_words_is_a_failure_with_its_cause() -> None:
    with StubEndpoint(lambda messages, params: "") as stub:
        (reply,) = judge(stub).ask([question()])
        assert (reply.failure, reply.reason) == ("api", "an answer without words (finish_reason=stop)")


def test_no_more_requests_at_a_time_than_allowed_from_any_number_of_threads() -> None:
    with StubEndpoint(echo, always=slow(0.02)) as stub:
        asked = judge(stub, concurrency=3)
        found: dict[int, list[Reply]] = {}

        def ask(i: int) -> None:
            found[i] = asked.ask([question(f"{i} {j}") for j in range(6)])

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {i: [Reply((f"about {i} {j}",)) for j in range(6)] for i in range(3)}
        assert stub.most_at_once == 3


def test_asked_from_inside_a_running_loop() -> None:
    async def training() -> list[Reply]:
        return asked.ask([question()])

    with StubEndpoint() as stub:
        asked = judge(stub)
        assert asyncio.run(training()) == [Reply(("4",))]
        assert asked.ask([]) == []
        assert len(stub.requests) == 1


def test_a_name_look_up_that_hangs_does_not_hold_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    with StubEndpoint() as stub:
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: released.wait(30) and [])
        before = time.monotonic()
        (reply,) = judge(stub, time_limit=0.2).ask([question()])
        assert reply.failure == "timeout"
        assert time.monotonic() - before < 15
        released.set()


@pytest.fixture
def running_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("running_threads")
def test_nothing_is_left_running() -> None:
    with StubEndpoint() as stub:
        judge(stub).ask([question()])


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
        assert "judge.max_requests=5" in next(reply.reason for reply in replies if reply.failure)


def test_retries_are_paid_from_the_same_budget() -> None:
    with StubEndpoint(always=status(500)) as stub:
        (reply,) = judge(stub, max_requests=3).ask([question()])
        assert (reply.failure, len(stub.requests)) == ("budget", 3)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": " "}, "judge.model: expected"),
        ({"concurrency": 0}, "judge.concurrency: expected a number above 0, got 0"),
        ({"request_timeout": float("nan")}, "judge.request_timeout"),
        ({"time_limit": 0.0}, "judge.time_limit"),
        ({"max_retries": -1}, "judge.max_retries"),
        ({"max_requests": 0}, "judge.max_requests"),
        ({"max_usd": 1.0}, "judge.max_usd: needs judge.prices"),
        ({"prices": {"input": 1.0}}, "judge.prices"),
        ({"prices": {"input": 1.0, "output": -1.0}}, "judge.prices"),
        ({"extra_body": {"n": 3, "logprobs": True}}, "judge.extra_body: logprobs, n are set by the question"),
        ({"extra_body": {"x": {1, 2}}}, "judge.extra_body: expected plain JSON values"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EndpointJudge(**{"model": "stub"} | arguments)
