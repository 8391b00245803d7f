"""What is asked of a server, and what is made of its answers."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.tiltmeter.scoring.asking import echo, judge, question
from tests.tiltmeter.scoring.stub_endpoint import (
    StubEndpoint,
    slow,
)
from tiltmeter.errors import UserError
from tiltmeter.judges.endpoint_judge import EndpointJudge
from tiltmeter.judges.judge import ChatMessage, Reply


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
        assert "score_mode=sample" in reply.reason
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


@pytest.fixture
def running_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("running_threads")
def test_nothing_is_left_running() -> None:
    with StubEndpoint() as stub:
        judge(stub).ask([question()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": " "}, "model: expected"),
        ({"concurrency": 0}, "concurrency: expected a number above 0, got 0"),
        ({"request_timeout": float("nan")}, "request_timeout"),
        ({"time_limit": 0.0}, "time_limit"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_requests": 0}, "max_requests"),
        ({"max_usd": 1.0}, "max_usd: needs prices"),
        ({"prices": {"input": 1.0}}, "prices"),
        ({"prices": {"input": 1.0, "output": -1.0}}, "prices"),
        ({"extra_body": {"n": 3, "logprobs": True}}, "extra_body: logprobs, n are set by the question"),
        ({"extra_body": {"x": {1, 2}}}, "extra_body: expected plain JSON values"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EndpointJudge(**{"model": "stub"} | arguments)
