"""A judge behind any OpenAI-compatible address: asked in bounded time and cost, remembered, and never in the way of training."""

import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tiltmeter.errors import UserError
from tiltmeter.judges.background import emitted_in_thread
from tiltmeter.judges.budget import Budget, Usage
from tiltmeter.judges.cache import ReplyCache, cache_key
from tiltmeter.judges.chat_completions import SET_HERE, RequestFailed, read_reply, request_body
from tiltmeter.judges.endpoint_client import OPENAI_HOST, TOO_LATE, Answered, EndpointClient, Learned
from tiltmeter.judges.endpoint_url import parse_endpoint
from tiltmeter.judges.judge import ChatMessage, Question, Reply
from tiltmeter.scoring.scorer import notice

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PROBE_SECONDS = 30.0
_PROBE_RETRIES = 1
_PROBE = Question((ChatMessage("user", "Answer with the digit 1 and nothing else."),), template="probe", choices=("1",))


class EndpointJudge:
    """A judge behind an OpenAI-compatible address, over its chat completions.

    The API key is known by the name of an environment variable only, read when it is needed and kept out of messages,
    logs and the cache. ``OPENAI_API_KEY`` goes to api.openai.com alone, unless ``api_key_env`` names it for another host.
    Calls from several threads take turns.

    Args:
        model: its name at the endpoint.
        base_url: https; http for local addresses alone.
        api_key_env: environment variable that holds the key. None: OPENAI_API_KEY for api.openai.com, no key elsewhere.
        concurrency: questions at a time.
        request_timeout: seconds for one request.
        time_limit: seconds for one :meth:`ask`, however many questions it has; what is not answered then has failed.
        max_retries: further tries of a request that failed in a way that may pass, after the wait that the server asks for.
        max_requests, max_tokens, max_usd: limits on what this object may spend in its life, checked before each request
            against the most it could use; tokens are those of prompts and completions together.
        prices: US dollars per million tokens, ``{"input": …, "output": …}``.
        cache: sqlite file of answers; None: none.
        allow_local: whether the endpoint may be on this machine or in a private network.
        extra_body: further parameters of every request, such as ``{"chat_template_kwargs": {"enable_thinking": False}}``.

    Raises:
        UserError: an argument is wrong.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str = f"https://{OPENAI_HOST}/v1",
        api_key_env: str | None = None,
        concurrency: int = 8,
        request_timeout: float = 60.0,
        time_limit: float = 600.0,
        max_retries: int = 5,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        max_usd: float | None = None,
        prices: Mapping[str, float] | None = None,
        cache: str | None = None,
        allow_local: bool = False,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if not model.strip():
            raise UserError("judge.model: expected the model's name at the endpoint, got an empty one")
        _check_numbers(concurrency=concurrency, request_timeout=request_timeout, time_limit=time_limit)
        if max_retries < 0:
            raise UserError(f"judge.max_retries: expected at least 0, got {max_retries}")
        self.model = model
        self.endpoint = parse_endpoint(base_url, allow_local=allow_local)
        self.api_key_env = _checked_variable(api_key_env)
        if api_key_env is None and self.endpoint.hostname == OPENAI_HOST:
            self.api_key_env = "OPENAI_API_KEY"
        self.concurrency = concurrency
        self.request_timeout = request_timeout
        self.time_limit = time_limit
        self.max_retries = max_retries
        self.extra_body = _checked_body(extra_body)
        self.name = f"{model}@{self.endpoint.name}"
        self._budget = Budget(max_requests=max_requests, max_tokens=max_tokens, max_usd=max_usd, prices=prices)
        self._cache = None if cache is None else ReplyCache(Path(cache).expanduser())
        self._learned = Learned()
        self._turn = threading.Lock()

    @property
    def usage(self) -> Usage:
        """Usage up to now; a copy."""
        return replace(self._budget.usage)

    def start(self, *, want_probabilities: bool) -> None:
        """Ask one question, in half a minute at most, to find out whether the endpoint can do what will be asked.

        Warns:
            UserWarning: it is down or too slow; answers will be missing until it is back.

        Raises:
            UserError: no key or a wrong one, no such model, an address that is not allowed, a cache that can't be written, a
                budget too small for a question, or no log-probs though probabilities are wanted.
        """
        self._api_key()
        if self._cache is not None:
            self._cache.check()
            self._warn_of_cache()
        self._learned = Learned()
        question = replace(_PROBE, want_probabilities=want_probabilities)
        deadline = time.monotonic() + min(self.time_limit, _PROBE_SECONDS)
        answers = list(
            self._answers({"probe": question}, deadline=deadline, max_retries=min(self.max_retries, _PROBE_RETRIES))
        )
        failed = answers[0].failed if answers else RequestFailed(TOO_LATE, is_passing=True)
        if failed is None or (not want_probabilities and answers[0].reply.texts):
            return  # whoever thinks for longer than the probe lets it may say nothing here
        if failed.key and not failed.is_passing:
            raise UserError(f"judge.{failed.key}: {self.name}: {failed.reason}")
        notice(f"judge {self.name} did not answer ({failed.reason}); its scores will be missing until it is back")

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Answer all questions within ``time_limit``, in their order; equal ones are asked once.

        An answer that is not there comes back as a failure: ``api`` (the endpoint can't or won't), ``timeout`` or ``budget``.
        """
        deadline = time.monotonic() + self.time_limit
        asked = [self._asked(question) for question in questions]
        keys = [cache_key(one) for one in asked]
        what = dict(zip(keys, asked, strict=True))
        distinct = dict(zip(keys, questions, strict=True))
        replies = self._remembered(distinct)
        self._budget.usage.cached += len(replies)
        unknown = {key: question for key, question in distinct.items() if key not in replies}
        stores = self._cache is not None
        for answer in self._answers(unknown, deadline=deadline, max_retries=self.max_retries):
            replies[answer.key] = answer.reply
            if self._cache is not None and stores and answer.failed is None:
                # a file that takes nothing now is not waited for again
                stores = self._cache.put(answer.key, what[answer.key], answer.responses)
        self._warn_of_cache()
        late = Reply(failure="timeout", reason=TOO_LATE)
        return [replies.get(key, late) for key in keys]

    def _answers(self, questions: Mapping[str, Question], *, deadline: float, max_retries: int) -> Iterator[Answered]:
        """Answers as they come; those that do not come in time are left out."""
        if not questions:
            return
        try:
            api_key = self._api_key()
        except UserError as error:
            failed = RequestFailed(str(error), key="api_key_env")
            reply = Reply(failure=failed.failure, reason=failed.reason)
            yield from (Answered(key, reply, [], failed) for key in questions)
            return
        seconds = deadline - time.monotonic()
        if not self._turn.acquire(timeout=max(0.0, seconds)):
            return
        try:
            client = EndpointClient(
                self.endpoint,
                self.model,
                api_key=api_key,
                key_hint=self._key_hint(),
                budget=self._budget,
                learned=self._learned,
                max_retries=max_retries,
                concurrency=self.concurrency,
                request_timeout=min(self.request_timeout, max(seconds, 0.0)),
                deadline=deadline,
                extra_body=self.extra_body,
            )
            yield from emitted_in_thread(partial(client.answer_all, questions), deadline=deadline)
        finally:
            self._turn.release()

    def _remembered(self, questions: Mapping[str, Question]) -> dict[str, Reply]:
        """Replies that the cache holds and that can still be read."""
        replies = {}
        for key, responses in (self._cache.get(questions) if self._cache is not None else {}).items():
            try:
                replies[key] = read_reply(questions[key], responses)
            except (RequestFailed, LookupError, TypeError, AttributeError):  # a damaged row is a miss
                continue
        return replies

    def _asked(self, question: Question) -> dict[str, Any]:
        """Everything that decides the answer; the key itself does not."""
        return {
            "endpoint": self.endpoint.url,
            "model": self.model,
            "body": request_body(question, n=question.n_samples) | self.extra_body,
            "template": question.template,
            "choices": question.choices,
        }

    def _api_key(self) -> str | None:
        """The key, read anew each time so that this object never holds it.

        Raises:
            UserError: the variable is not set, or what it holds can't be sent.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise UserError(
                f"judge.api_key_env: the environment variable {self.api_key_env} is not set; export the key in it"
            )
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(f"judge.api_key_env: {self.api_key_env} holds characters that no key has; export it anew")
        return key

    def _key_hint(self) -> str:
        if self.api_key_env is None:
            return "no key was sent: name the environment variable that holds it in judge.api_key_env"
        return f"check the key in the environment variable {self.api_key_env}"

    def _warn_of_cache(self) -> None:
        for text in [] if self._cache is None else self._cache.take_notices():
            notice(text)


def _check_numbers(**values: int | float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"judge.{name}: expected a number above 0, got {value}")


def _checked_variable(name: str | None) -> str | None:
    if name is not None and not _VARIABLE.fullmatch(name):
        # what stands there is not shown: it may be the key
        raise UserError("judge.api_key_env: expected the NAME of an environment variable, such as OPENAI_API_KEY")
    return name


def _checked_body(extra_body: Mapping[str, Any] | None) -> dict[str, Any]:
    body = dict(extra_body or {})
    if taken := sorted(SET_HERE & set(body)):
        raise UserError(f"judge.extra_body: {', '.join(taken)} are set by the question, take them out")
    try:
        json.dumps(body)
    except TypeError as error:
        raise UserError(f"judge.extra_body: expected plain JSON values ({error})") from None
    return body
