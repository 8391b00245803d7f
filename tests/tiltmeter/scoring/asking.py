"""What the tests of judges behind an address share: a question, and a judge on loopback."""

from dataclasses import replace
from typing import Any

from tests.tiltmeter.scoring.stub_endpoint import StubEndpoint
from tiltmeter.judges.endpoint_judge import EndpointJudge
from tiltmeter.judges.judge import ChatMessage, Question


def question(text: str = "Is it good?", **changes: Any) -> Question:
    return replace(Question((ChatMessage("user", text),), template="t1", choices=tuple("12345")), **changes)


def judge(stub: StubEndpoint, **arguments: Any) -> EndpointJudge:
    return EndpointJudge("stub", **{"base_url": stub.base_url, "allow_local": True, "time_limit": 600.0} | arguments)


def echo(messages: list[dict[str, str]], params: dict[str, Any]) -> str:
    return f"about {messages[-1]['content']}"
