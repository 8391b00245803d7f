"""A round of questions to a chat endpoint: several at a time, within a budget, until a deadline.

The client tries again by itself: refused connections, timeouts, 408, 409, 429 and 5xx, after what Retry-After says up to two
minutes, else 0.5 to 8 s.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import openai

from tiltmeter.judges.budget import Budget, OverBudget, Tokens, most_tokens
from tiltmeter.judges.chat_completions import (
    LIMIT_NAMES,
    RequestFailed,
    Response,
    all_texts,
    answer_tokens,
    failed_request,
    parse_response,
    read_reply,
    request_body,
    used_tokens,
)
from tiltmeter.judges.endpoint_url import Endpoint
from tiltmeter.judges.judge import Question, Reply
from tiltmeter.judges.redaction import redacted_logs, shown

OPENAI_HOST = "api.openai.com"
TOO_LATE = "not answered within judge.time_limit"
_LOGGERS = ("openai", "httpx2", "httpcore2")
GIVE_UP_AFTER = 24
"""Questions in a row that got no answer in all their tries: the rest of the round is not asked. Some waves of concurrent ones."""
_NO_KEY = "none"  # the client insists on one; servers without keys don't look at it


@dataclass
class Learned:
    """Lessons of an endpoint, for as long as its judge lives."""

    limit_name: str = LIMIT_NAMES[0]
    takes_n: bool = True
    refusal: str = ""
    """Why it does not let us in; asking again would change nothing."""


class Answered(NamedTuple):
    """Outcome of one question."""

    key: str
    reply: Reply
    responses: list[Response]
    """All of the answer, for the cache; empty after a failure."""
    failed: RequestFailed | None


class EndpointClient:
    """One round of questions; made anew for each, since connections belong to an event loop.

    Args:
        api_key: None: none is sent.
        key_hint: what to do when the endpoint does not let us in.
        deadline: on the clock of :func:`time.monotonic`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        *,
        api_key: str | None,
        key_hint: str,
        budget: Budget,
        learned: Learned,
        max_retries: int,
        concurrency: int,
        request_timeout: float,
        deadline: float,
        extra_body: Mapping[str, Any],
    ) -> None:
        self.endpoint = endpoint
        self.model = model
        self.budget = budget
        self.learned = learned
        self.max_retries = max_retries
        self.request_timeout = request_timeout
        self.deadline = deadline
        self._extra_body = dict(extra_body)
        self._api_key = api_key
        self._key_hint = key_hint
        self._secrets = [] if api_key is None else [api_key]
        self._slots = asyncio.Semaphore(concurrency)
        self._settled = asyncio.Event()
        self._n_lost = 0
        self._client: openai.AsyncOpenAI

    async def answer_all(self, questions: Mapping[str, Question], emit: Callable[[Answered], None]) -> None:
        """Answer every question, each emitted as it is there, with its key; after the deadline as a failure."""
        ends = asyncio.get_running_loop().time() + self.deadline - time.monotonic()
        try:
            client = _connected(self.endpoint, self._api_key, timeout=self.request_timeout)
        except Exception as error:  # what the environment says of proxies and certificates may be wrong
            failed = RequestFailed(f"{type(error).__name__}: {shown(str(error), self._secrets)}")
            for key in questions:
                emit(_failure(key, failed, []))
            return
        with redacted_logs(_LOGGERS, self._secrets):
            async with client as self._client:
                await asyncio.gather(*(self._answer(key, one, ends, emit) for key, one in questions.items()))

    async def _answer(self, key: str, question: Question, ends: float, emit: Callable[[Answered], None]) -> None:
        responses: list[Response] = []
        try:
            async with asyncio.timeout_at(ends), self._slots:  # held while waiting to retry: who is slow is asked less
                if self._n_lost >= GIVE_UP_AFTER:
                    raise RequestFailed(f"not asked: {self._n_lost} questions in a row got no answer", is_passing=True)
                await self._draw(question, responses)
            self._n_lost = 0
            emit(Answered(key, read_reply(question, responses), responses, None))
        except RequestFailed as failed:
            self._n_lost += failed.is_passing and self._n_lost < GIVE_UP_AFTER
            emit(_failure(key, failed, responses))
        except TimeoutError:
            emit(_failure(key, RequestFailed(TOO_LATE, failure="timeout", is_passing=True), responses))
        except Exception as error:  # a judge must not stop what asked it
            emit(_failure(key, self._described(error, question), responses))

    async def _draw(self, question: Question, responses: list[Response]) -> None:
        """Fill ``responses`` until they hold all the answers of a question; some servers give one, whatever ``n`` says."""
        missing = 1 if question.want_probabilities else question.n_samples
        at_once = missing if self.learned.takes_n else 1
        while missing > 0:
            n = min(missing, at_once)
            limit_name = self.learned.limit_name
            try:
                response = await self._send(question, request_body(question, n=n, limit_name=limit_name))
            except RequestFailed as failed:
                if failed.status not in (400, 422):  # not about the request's fields
                    raise
                if limit_name == LIMIT_NAMES[0] and LIMIT_NAMES[1] in failed.reason:
                    self.learned.limit_name = LIMIT_NAMES[1]
                elif n > 1:
                    at_once = 1
                else:
                    raise
                continue
            if n < missing:
                self.learned.takes_n = False
            responses.append(response)
            missing -= len(response["choices"])

    async def _send(self, question: Question, body: dict[str, Any]) -> Response:
        """One request, counted and paid for with the tries that it took."""
        if self.learned.refusal:
            raise RequestFailed(self.learned.refusal, key="api_key_env")
        most = most_tokens(
            [message.content for message in question.messages],
            n=body.get("n", 1),
            max_tokens=answer_tokens(question),
        )
        tries = await self._reserve(most)
        taken, used = tries, most.times(tries)
        try:
            raw = await self._client.with_options(max_retries=tries - 1).chat.completions.with_raw_response.create(
                model=self.model, **body, extra_body=self._extra_body or None
            )
            taken = raw.retries_taken + 1
            used = most.times(taken)
            response = parse_response(raw.text, self._secrets)
            used = most.times(raw.retries_taken).plus(used_tokens(response) or most)
            return response
        except openai.APIError as error:
            taken = int(error.request.headers.get("x-stainless-retry-count", "0")) + 1
            used = Tokens(0, 0) if _was_not_charged(error) else most.times(taken)
            raise self._described(error, question) from None
        finally:
            self.budget.settle(most, used, tries=tries, taken=taken)
            self._settled.set()

    async def _reserve(self, tokens: Tokens) -> int:
        try:
            while not (tries := self.budget.reserve(tokens, tries=self.max_retries + 1)):
                self._settled.clear()
                await self._settled.wait()
        except OverBudget as over:
            raise RequestFailed(str(over), failure="budget", key=over.limit) from None
        return tries

    def _described(self, error: Exception, question: Question) -> RequestFailed:
        failed = failed_request(
            error,
            self._secrets,
            asked_for_log_probs=question.want_probabilities,
            timeout=self.request_timeout,
        )
        if failed.key == "api_key_env":
            self.learned.refusal = f"{failed.reason}; {self._key_hint}"
            return RequestFailed(self.learned.refusal, status=failed.status, key=failed.key)
        return failed


def _connected(endpoint: Endpoint, api_key: str | None, *, timeout: float) -> openai.AsyncOpenAI:
    """A client that follows no redirects and takes nothing from the environment to servers that are not OpenAI's.

    Local servers are reached directly: a proxy on another machine knows no loopback, and private text stays here.
    """
    authorization = f"Bearer {api_key or _NO_KEY}"
    headers: dict[str, Any] = {}
    if endpoint.hostname != OPENAI_HOST:
        custom = os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")
        names = [line.split(":")[0].strip() for line in custom if ":" in line]
        headers = dict.fromkeys(["OpenAI-Organization", "OpenAI-Project", *names], openai.omit)
        headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        headers["Authorization"] = authorization
    http = openai.DefaultAsyncHttpxClient(
        follow_redirects=False, mounts={"http://": None, "https://": None} if endpoint.is_local else None
    )
    return openai.AsyncOpenAI(
        api_key=api_key or _NO_KEY,
        base_url=endpoint.url,
        timeout=timeout,
        default_headers=headers,
        http_client=http,
    )


def _failure(key: str, failed: RequestFailed, responses: list[Response]) -> Answered:
    return Answered(key, Reply(all_texts(responses), failure=failed.failure, reason=failed.reason), [], failed)


def _was_not_charged(error: Exception) -> bool:
    """Whether a request cost nothing, going by its last try: refused by the server, or never sent."""
    # by its name, since the class belongs to the client's transport, which is not ours to import
    return isinstance(error, openai.APIStatusError) or type(error.__cause__).__name__.startswith("Connect")
