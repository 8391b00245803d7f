"""Whatever a server does, a judge fails in words and in time, and tries again what may pass."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from tests.processes import HANGS
from tests.tiltmeter.scoring.asking import echo, judge, question
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
from tiltmeter.judges.endpoint_client import GIVE_UP_AFTER
from tiltmeter.judges.endpoint_judge import EndpointJudge
from tiltmeter.judges.judge import Reply

PASSING: dict[str, Callable[[], Fault]] = {
    "429": lambda: status(429),
    "408": lambda: status(408),
    "409": lambda: status(409),
    "500": lambda: status(500),
    "503": lambda: status(503),
    "half a response, then hung up": lambda: truncated(broken_connection=True),
    "hung up": dropped,
}
NO_ANSWER: dict[str, Callable[[], Fault]] = {
    "html": html,
    "half a response": truncated,
    "empty choices": empty_choices,
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


@pytest.mark.parametrize("name", NO_ANSWER)
def test_a_response_that_is_no_answer_is_a_failure(name: str) -> None:
    with StubEndpoint(always=NO_ANSWER[name]()) as stub:
        (reply,) = judge(stub, max_retries=2).ask([question()])
        assert (reply.texts, reply.failure, bool(reply.reason), len(stub.requests)) == ((), "api", True, 1)


def test_an_endpoint_that_stays_down_is_not_asked_to_the_end() -> None:
    with StubEndpoint(always=status(500)) as stub:
        replies = judge(stub, max_retries=1, concurrency=1).ask([question(str(i)) for i in range(GIVE_UP_AFTER + 9)])
        assert len(stub.requests) == 2 * GIVE_UP_AFTER
        assert {reply.failure for reply in replies} == {"api"}
        assert [reply.reason.startswith("not asked") for reply in replies] == [False] * GIVE_UP_AFTER + [True] * 9


def test_an_answer_now_and_then_keeps_the_questions_coming() -> None:
    faults = ([status(500)] * (GIVE_UP_AFTER - 1) + [None]) * 2
    with StubEndpoint(faults=faults) as stub:
        asked = judge(stub, max_retries=0, concurrency=1)
        replies = asked.ask([question(str(i)) for i in range(len(faults))])
        assert [reply.failure is None for reply in replies] == [fault is None for fault in faults]


@pytest.mark.parametrize("code", [400, 404, 413, 422])
def test_what_can_not_pass_is_not_tried_again(code: int) -> None:
    with StubEndpoint(always=status(code, "the context is too long")) as stub:
        (reply,) = judge(stub).ask([question()])
        assert reply.failure == "api"
        assert reply.reason.startswith(f"HTTP {code}: the context is too long")
        assert len(stub.requests) == 1


def test_a_quota_that_is_used_up_is_not_asked_for_again() -> None:
    with StubEndpoint(always=status(429, "no credit", code="insufficient_quota")) as stub:
        replies = judge(stub, concurrency=1, max_retries=1).ask([question(), question("another")])
        assert all(reply.reason.startswith("HTTP 429: no credit") for reply in replies)
        assert len(stub.requests) == 2


def test_waits_as_long_as_the_server_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("openai._base_client.anyio.sleep", note)
    with StubEndpoint(faults=[status(429, retry_after="3"), status(503, retry_after="0.5")]) as stub:
        assert judge(stub).ask([question()]) == [Reply(("4",))]
    assert waits == [3.0, 0.5]


def test_a_server_that_asks_to_wait_for_an_hour_is_not_waited_for() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    for retry_after in ("3600", date):
        with StubEndpoint(always=status(429, "slow down", retry_after=retry_after)) as stub:
            assert judge(stub).ask([question()]) == [Reply(failure="api", reason="HTTP 429: slow down")]
            assert len(stub.requests) == 1


def test_a_wait_ends_at_the_time_limit() -> None:
    with StubEndpoint(always=status(429, retry_after="100")) as stub:
        (reply,) = judge(stub, time_limit=0.5).ask([question()])
        assert (reply.failure, reply.reason) == ("timeout", "not answered within time_limit")


def test_an_environment_that_can_not_be_used_is_a_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/certificates.pem")
    with StubEndpoint() as stub:
        (reply,) = judge(stub).ask([question()])
        assert (reply.failure, stub.requests) == ("api", [])
        with pytest.warns(UserWarning, match="did not answer"):
            judge(stub).start(want_probabilities=False)


def test_nobody_there() -> None:
    asked = EndpointJudge("stub", base_url=refused_url(), allow_local=True, max_retries=0, max_tokens=1000)
    replies = asked.ask([question(str(i)) for i in range(20)])
    assert {reply.failure for reply in replies} == {"api"}
    assert "no connection" in replies[0].reason
    assert asked.usage.prompt_tokens == 0, "nothing was sent, so nothing is spent"


def test_a_slow_answer_is_a_timeout_and_counts_as_spent() -> None:
    with StubEndpoint(always=slow(30)) as stub:
        asked = judge(stub, request_timeout=1.0, max_retries=1)
        assert asked.ask([question()]) == [Reply(failure="timeout", reason="no answer within 1 s")]
        assert len(stub.requests) == 2
        assert asked.usage.prompt_tokens > 2 * len("Is it good?")


def test_after_the_time_limit_there_is_what_there_is() -> None:
    for limit in (0.7, 7.0, 70.0):  # the first is enough for two answers where the machine does nothing else
        with StubEndpoint(echo, faults=[None, None], always=slow(HANGS)) as stub:
            replies = judge(stub, time_limit=limit, concurrency=2).ask([question(str(i)) for i in range(6)])
        for i, reply in enumerate(replies):
            assert reply.failure == "timeout" or reply.texts == (f"about {i}",)
        assert {reply.reason for reply in replies if reply.failure} == {"not answered within time_limit"}
        if (n_late := [reply.failure for reply in replies].count("timeout")) == 4:
            break
    assert n_late == 4


def test_samples_that_came_before_a_failure_are_kept() -> None:
    with StubEndpoint(supports_n=False, faults=[None, None, status(404)]) as stub:
        (reply,) = judge(stub).ask([question(n_samples=4)])
        assert (reply.texts, reply.failure) == (("4", "4"), "api")


def test_an_answer_without_words_is_a_failure_with_its_cause() -> None:
    with StubEndpoint(lambda messages, params: "") as stub:
        (reply,) = judge(stub).ask([question()])
        assert (reply.failure, reply.reason) == ("api", "an answer without words (finish_reason=stop)")
