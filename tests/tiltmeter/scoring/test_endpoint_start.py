"""What is found out before anything expensive: an error in one line for what a person must mend, a warning for what may pass."""

import re
from pathlib import Path

import pytest

from tests.tiltmeter.scoring.asking import judge, question
from tests.tiltmeter.scoring.stub_endpoint import (
    Fault,
    StubEndpoint,
    empty_choices,
    html,
    redirect,
    refused_url,
    slow,
    status,
)
from tiltmeter.errors import UserError
from tiltmeter.judges.endpoint_judge import EndpointJudge
from tiltmeter.judges.judge import Reply


@pytest.mark.parametrize("want_probabilities", [True, False])
def test_one_request_finds_out_that_all_is_well(want_probabilities: bool) -> None:
    with StubEndpoint() as stub:
        asked = judge(stub)
        asked.start(want_probabilities=want_probabilities)
        assert len(stub.requests) == asked.usage.requests == 1
        assert ("logprobs" in stub.requests[0].body) == want_probabilities


@pytest.mark.parametrize("log_probs", [False, "refused"])
def test_no_log_probs(log_probs: bool | str) -> None:
    with StubEndpoint(log_probs=log_probs) as stub:
        judge(stub).start(want_probabilities=False)
        with pytest.raises(UserError, match=r"^model: stub@.*score_mode=sample"):
            judge(stub).start(want_probabilities=True)


def test_403_for_log_probs_is_not_about_the_key() -> None:
    with (
        StubEndpoint(always=status(403, "You are not allowed to request logprobs from this model")) as stub,
        pytest.raises(UserError, match=r"^model: .*score_mode=sample"),
    ):
        judge(stub).start(want_probabilities=True)


def test_no_such_model() -> None:
    with (
        StubEndpoint(models=["other"]) as stub,
        pytest.raises(UserError, match=r"^model: stub@.*The model `stub` does not exist"),
    ):
        judge(stub).start(want_probabilities=True)


def test_a_question_that_the_model_does_not_take() -> None:
    with (
        StubEndpoint(always=status(400, "temperature does not support 0", param="temperature")) as stub,
        pytest.raises(UserError, match=r"^model: stub@.*temperature does not support 0"),
    ):
        judge(stub).start(want_probabilities=False)


def test_a_redirect_is_an_error_and_not_followed() -> None:
    with (
        StubEndpoint() as target,
        StubEndpoint(always=redirect(f"{target.base_url}/chat/completions?key=canary")) as stub,
    ):
        with pytest.raises(UserError, match=r"^base_url: .*redirect to http://127.*not followed") as caught:
            judge(stub).start(want_probabilities=True)
        (reply,) = judge(stub).ask([question()])
        assert (reply.failure, len(target.requests)) == ("api", 0)
        assert "canary" not in str(caught.value) + reply.reason


def test_a_budget_too_small_for_one_question() -> None:
    with StubEndpoint() as stub:
        with pytest.raises(UserError, match=r"^max_tokens: .*could exceed max_tokens=20"):
            judge(stub, max_tokens=20).start(want_probabilities=True)
        assert stub.requests == []


def test_no_key_is_an_error_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "  "):
        monkeypatch.delenv("JUDGE_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("JUDGE_KEY", value)
        with StubEndpoint() as stub:
            asked = judge(stub, api_key_env="JUDGE_KEY")
            with pytest.raises(UserError, match=r"^api_key_env: .*JUDGE_KEY is not set"):
                asked.start(want_probabilities=True)
            (reply,) = asked.ask([question()])
            assert (reply.failure, stub.requests) == ("api", [])
            assert "JUDGE_KEY is not set" in reply.reason


@pytest.mark.parametrize("code", [401, 403])
def test_a_wrong_key_fails_fast_and_for_good(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "the-wrong-key")
    with StubEndpoint(always=status(code, "no entry")) as stub:
        asked = judge(stub, api_key_env="JUDGE_KEY", concurrency=1)
        with pytest.raises(UserError, match=r"^api_key_env: .*no entry.*environment variable JUDGE_KEY"):
            asked.start(want_probabilities=True)
        replies = asked.ask([question(str(i)) for i in range(5)])
        assert {reply.failure for reply in replies} == {"api"}
        assert all("JUDGE_KEY" in reply.reason for reply in replies)
        assert len(stub.requests) == 1, "no one knocks twice"


def test_a_key_where_none_was_named() -> None:
    with (
        StubEndpoint(key="needed-but-absent") as stub,
        pytest.raises(UserError, match=r"^api_key_env: .*no key was sent"),
    ):
        judge(stub).start(want_probabilities=False)


def test_a_start_after_the_key_was_mended_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "the-wrong-key")
    with StubEndpoint(key="the-right-key") as stub:
        asked = judge(stub, api_key_env="JUDGE_KEY")
        assert asked.ask([question()])[0].failure == "api"
        monkeypatch.setenv("JUDGE_KEY", "the-right-key\n")
        asked.start(want_probabilities=True)
        assert asked.ask([question()])[0].texts == ("4",)


@pytest.mark.parametrize(
    "fault", [status(500), status(503, retry_after="3600"), status(429), html(), empty_choices(), slow(60)]
)
def test_who_is_down_is_warned_of_quickly_and_asked_again_later(fault: Fault) -> None:
    with StubEndpoint(always=fault) as stub:
        asked = judge(stub, request_timeout=0.1)
        with pytest.warns(UserWarning, match=re.escape(f"judge {asked.name} did not answer")):
            asked.start(want_probabilities=True)
        assert len(stub.requests) <= 2
        stub.always, asked.request_timeout = None, 60.0
        assert asked.ask([question()]) == [Reply(("4",))]


@pytest.mark.parametrize("want_probabilities", [True, False])
def test_who_does_not_answer_at_all_is_warned_of(want_probabilities: bool) -> None:
    with StubEndpoint(always=slow(60)) as stub, pytest.warns(UserWarning, match=r"within time_limit"):
        judge(stub, time_limit=0.2).start(want_probabilities=want_probabilities)


def test_nobody_there_is_a_warning() -> None:
    asked = EndpointJudge("stub", base_url=refused_url(), allow_local=True)
    with pytest.warns(UserWarning, match="no connection"):
        asked.start(want_probabilities=True)


def test_a_model_that_thinks_for_longer_than_the_probe_may_start() -> None:
    with StubEndpoint(lambda messages, params: "") as stub:
        judge(stub).start(want_probabilities=False)


def test_making_one_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = EndpointJudge("gpt-4.1", cache=str(tmp_path / "deep" / "cache.sqlite"))
    assert (made.name, made.api_key_env, list(tmp_path.iterdir())) == ("gpt-4.1@api.openai.com", "OPENAI_API_KEY", [])
    with pytest.raises(UserError, match=r"^api_key_env: .*OPENAI_API_KEY is not set"):
        made.start(want_probabilities=True)
