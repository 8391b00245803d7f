"""A key goes into one header to one host, and nowhere else: not into messages, logs, caches, objects or to other hosts."""

import logging
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiltmeter.scoring.asking import judge, question
from tests.tiltmeter.scoring.stub_endpoint import (
    Fault,
    StubEndpoint,
    dropped,
    echoing_key,
    html,
    redirect,
    slow,
    status,
    truncated,
)
from tiltmeter.errors import UserError
from tiltmeter.judges.endpoint_judge import EndpointJudge

CANARY = "canary/0123456789+AbCdEf"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", CANARY)


def no_canary(text: str) -> bool:
    return not any(
        piece in text for piece in (CANARY, "0123456789+AbCdEf", "0123456789%2BAbCdEf", "MDEyMzQ1Njc4OStBYkNkRWY")
    )


FAULTS: dict[str, Callable[[], Fault | None]] = {
    "none": lambda: None,
    "echo 401": lambda: echoing_key(401),
    "echo 400": lambda: echoing_key(400),
    "echo 500": lambda: echoing_key(500),
    "echo in a page": lambda: (
        lambda request, response: html()(request, response)._replace(  # type: ignore[union-attr]
            body=f"<p>{request.headers['authorization']}</p>".encode()
        )
    ),
    "echo as text": lambda: (
        lambda request, response: response._replace(
            status=404, body=f"no route, {request.headers['authorization']}".encode()
        )
    ),
    "echo in a detail": lambda: (
        lambda request, response: response._replace(
            status=422, body=b'{"detail": [{"input": "Bearer %s"}]}' % CANARY.encode()
        )
    ),
    "redirect with the key": lambda: redirect(f"https://example.org/{CANARY}"),
    "redirect with the key encoded": lambda: redirect("https://example.org/canary%2F0123456789%2BAbCdEf"),
    "slow": lambda: slow(30),
    "hung up": dropped,
    "half": truncated,
    "half masked": lambda: status(401, "Incorrect API key provided: sk-abcd****wxyz"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_key_is_sent_and_shown_nowhere(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    caplog.set_level(logging.DEBUG)
    for logger in ("openai", "httpx2", "httpcore2", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=logger)
    shown = []
    with StubEndpoint(lambda messages, params: f"4 {CANARY}", always=FAULTS[name]()) as stub:
        asked = judge(
            stub,
            api_key_env="JUDGE_KEY",
            cache=str(tmp_path / "c.sqlite"),
            request_timeout=0.2 if name == "slow" else 60.0,
            max_retries=1,
        )
        try:
            asked.start(want_probabilities=True)
        except UserError as error:
            shown += [str(error), repr(error), "".join(traceback.format_exception(error)), repr(error.__context__)]
        replies = asked.ask([question(), question(want_probabilities=True)])
        assert {request.headers["authorization"] for request in stub.requests} == {f"Bearer {CANARY}"}
    shown += [repr(replies), repr(asked), repr(vars(asked)), caplog.text, repr([str(w.message) for w in recwarn])]
    shown += [file.read_bytes().decode("latin1") for file in tmp_path.iterdir()]
    for text in shown:
        assert no_canary(text), text[:2000]
        assert "abcd****" not in text
    if name == "none":
        assert replies[0].texts == ("4 [redacted]",)


def test_openai_s_key_goes_to_openai_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, CANARY)
    headers = f"Authorization: Bearer {CANARY}\nX-Gateway: {CANARY}\napi-key: {CANARY}"
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", headers)
    monkeypatch.setenv("OPENAI_BASE_URL", "https://example.org")
    with StubEndpoint() as stub:
        judge(stub).ask([question()])
        (request,) = stub.requests
        assert no_canary(str(request))
        assert request.headers["authorization"] == "Bearer none"
        judge(stub, api_key_env="OPENAI_API_KEY").ask([question()])
        assert stub.requests[1].headers["authorization"] == f"Bearer {CANARY}"
        assert str(stub.requests[1].headers).count(CANARY) == 1


@pytest.mark.parametrize(
    "host", ["api.openai.com.evil.org", "xapi.openai.com", "openai.com", "api.openai.com.", "api-openai.com"]
)
def test_hosts_that_look_like_openai_get_no_key(host: str) -> None:
    assert EndpointJudge("m", base_url=f"https://{host}/v1").api_key_env is None


def test_the_key_itself_in_the_place_of_its_name_is_not_repeated() -> None:
    with pytest.raises(UserError, match="NAME of an environment variable") as caught:
        EndpointJudge("m", api_key_env=CANARY)
    assert no_canary(str(caught.value))


@pytest.mark.parametrize("key", [f"{CANARY}\nX-Evil: 1", f"{CANARY} x", f"{CANARY}ü", f"{CANARY}\x00"[:-1] + "\x07"])
def test_a_key_that_can_not_be_sent_is_an_error_that_does_not_show_it(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    with StubEndpoint() as stub:
        with pytest.raises(UserError, match="JUDGE_KEY holds characters that no key has") as caught:
            judge(stub, api_key_env="JUDGE_KEY").start(want_probabilities=False)
        assert no_canary(str(caught.value))
        assert stub.requests == []


def test_what_a_stranger_says_is_one_printable_line() -> None:
    with StubEndpoint(always=status(400, "\x1b[31mred\nsecond line\r" + "x" * 9999)) as stub:
        (reply,) = judge(stub).ask([question()])
        assert reply.reason.isprintable()
        assert reply.reason.startswith("HTTP 400: [31mred second line")
        assert len(reply.reason) < 300


def test_local_servers_are_reached_past_any_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with StubEndpoint() as stub:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert judge(stub).ask([question()])[0].texts == ("4",)
