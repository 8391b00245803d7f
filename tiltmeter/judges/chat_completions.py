"""The chat completions interface: a question as a request, what may be read from a response, and what can go wrong."""

import json
import math
from collections.abc import Sequence
from typing import Any

import openai

from tiltmeter.errors import argument
from tiltmeter.judges.budget import Tokens
from tiltmeter.judges.judge import Failure, Question, Reply
from tiltmeter.judges.redaction import shown, without

Response = dict[str, Any]
TOP_LOG_PROBS = 20  # the most that OpenAI and vLLM give
LIMIT_NAMES = ("max_tokens", "max_completion_tokens")
"""Names that servers have for the most tokens of an answer: the first nearly everywhere, the second at OpenAI's thinking models."""
SET_HERE = frozenset(
    ["model", "messages", "temperature", "top_p", *LIMIT_NAMES, "n", "logprobs", "top_logprobs", "stream"]
)
"""Parameters that a question decides, so nobody else may."""
_SPACES = (" ", "Ġ", "▁")
"""Ways in which tokenizers write a space before a word."""
_PASSING = (408, 409, 429)
_HOPELESS = ("insufficient_quota", "billing_hard_limit_reached")
"""Codes of a 429 that no waiting mends."""


class RequestFailed(Exception):
    """A request brought no answer.

    Args:
        failure, reason: as in :class:`tiltmeter.judges.judge.Reply`; the reason is redacted.
        is_passing: whether the same request may work later.
        status: HTTP status, where there was one.
        argument: of :class:`~tiltmeter.judges.endpoint_judge.EndpointJudge`, that is probably wrong; empty: none.
    """

    def __init__(
        self,
        reason: str,
        *,
        failure: Failure = "api",
        is_passing: bool = False,
        status: int | None = None,
        argument: str = "",
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.failure = failure
        self.is_passing = is_passing
        self.status = status
        self.argument = argument


def answer_tokens(question: Question) -> int:
    """The most tokens that an answer may have; probabilities are read at the first, so no more is asked for."""
    return 1 if question.want_probabilities else question.max_tokens


def request_body(question: Question, *, n: int, limit_name: str = LIMIT_NAMES[0]) -> dict[str, Any]:
    """Request body without the model's name."""
    body: dict[str, Any] = {
        "messages": [{"role": message.role, "content": message.content} for message in question.messages],
        "temperature": question.temperature,
        "top_p": question.top_p,
        limit_name: answer_tokens(question),
    }
    if question.want_probabilities:
        body |= {"logprobs": True, "top_logprobs": TOP_LOG_PROBS}
    if n > 1:
        body["n"] = n
    return body


def parse_response(text: str, secrets: Sequence[str]) -> Response:
    """The response as JSON with at least one choice.

    Raises:
        RequestFailed: anything else with status 200 (a gateway's page, half a response, an error in the place of choices).
    """
    try:
        content = json.loads(text)
        content = json.loads(without(json.dumps(content, ensure_ascii=False), secrets))  # unescaped, so that none hides
    except (ValueError, RecursionError):
        raise RequestFailed(f"a response that is no JSON: {shown(text, secrets, limit=60)}", is_passing=True) from None
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or not all(
        isinstance(one, dict) and isinstance(one.get("message"), dict) for one in choices
    ):
        raise RequestFailed(f"no completion: {shown(text, secrets, limit=120)}", is_passing=True)
    if not choices:
        raise RequestFailed("a response without choices", is_passing=True)
    return dict(content)


def used_tokens(response: Response) -> Tokens | None:
    """Tokens that the server counted; None: it did not say."""
    match response.get("usage"):
        case {"prompt_tokens": int(prompt), "completion_tokens": int(completion)} if min(prompt, completion) >= 0:
            return Tokens(prompt, completion)
    return None


def all_texts(responses: Sequence[Response]) -> tuple[str, ...]:
    """The words of every choice; what is no string is no word."""
    contents = [choice["message"].get("content") for response in responses for choice in response["choices"]]
    return tuple(content if isinstance(content, str) else "" for content in contents)


def read_reply(question: Question, responses: Sequence[Response]) -> Reply:
    """The answer in responses that :func:`parse_response` let through.

    Raises:
        RequestFailed: no words at all, or no log-probs where they were asked for.
    """
    choices = [choice for response in responses for choice in response["choices"]]
    texts = all_texts(responses)[: question.n_samples]
    if question.want_probabilities:
        return Reply(texts, first_token_probabilities(choices[0], question.choices))
    if not any(text.strip() for text in texts):
        ends = {str(choice.get("finish_reason")) for choice in choices}
        raise RequestFailed(f"an answer without words (finish_reason={shown(', '.join(sorted(ends)))})")
    return Reply(texts)


def first_token_probabilities(choice: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Probability of each allowed answer at the first token of a completion, summed over spellings with a space before it.

    Raises:
        RequestFailed: no log-probs there, or numbers that are none.

    >>> top = [{"token": "4", "logprob": math.log(0.5)}, {"token": " 4", "logprob": math.log(0.25)}]
    >>> choice = {"logprobs": {"content": [{"token": "4", "logprob": math.log(0.5), "top_logprobs": top}]}}
    >>> first_token_probabilities(choice, ["4", "5"])
    {'4': 0.75, '5': 0.0}
    """
    try:
        first = choice["logprobs"]["content"][0]
        found = {str(one["token"]): 0.0 for one in [first, *first["top_logprobs"]]}
        for one in first["top_logprobs"]:
            found[str(one["token"])] += math.exp(one["logprob"])
        found[str(first["token"])] = found[str(first["token"])] or math.exp(first["logprob"])
    except (LookupError, TypeError, OverflowError):
        raise _no_log_probs("the response has no log-probs for its first token") from None
    sums = {answer: sum(found.get(space + answer, 0.0) for space in ("", *_SPACES)) for answer in answers}
    if not sum(found.values()) <= 1.01:  # NaN too
        raise _no_log_probs("the log-probs of the first token are not those of a distribution")
    return sums


def failed_request(error: Exception, secrets: list[str], *, asked_for_log_probs: bool, timeout: float) -> RequestFailed:
    """The failure that an exception of the client means."""
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return RequestFailed(f"no answer within {timeout:g} s", failure="timeout", is_passing=True)
    if isinstance(error, openai.APIStatusError):
        return _failed_status(error, secrets, asked_for_log_probs=asked_for_log_probs)
    if isinstance(error, openai.APIConnectionError):
        cause = shown(str(error.__cause__ or error), secrets)
        return RequestFailed(f"no connection: {cause}", is_passing=True)
    return RequestFailed(f"{type(error).__name__}: {shown(str(error), secrets)}")


def _failed_status(error: openai.APIStatusError, secrets: list[str], *, asked_for_log_probs: bool) -> RequestFailed:
    status = error.status_code
    body = error.body if isinstance(error.body, dict) else {}
    reason = f"HTTP {status}: {shown(str(body.get('message') or body.get('detail') or error.body or ''), secrets)}"
    if status < 400:
        target = shown(error.response.headers.get("location", "").split("?")[0], secrets)
        return RequestFailed(
            f"HTTP {status}: a redirect to {target}, which is not followed; set the address itself",
            status=status,
            argument="base_url",
        )
    if asked_for_log_probs and 400 <= status < 500 and "logprob" in reason.replace("_", "").lower():
        return RequestFailed(
            f"{reason}; it gives no log-probs: set {argument('GEvalScorer.score_mode')}=sample",
            status=status,
            argument="model",
        )
    if status in (401, 403) or error.code in _HOPELESS:
        return RequestFailed(reason, status=status, argument="api_key_env")
    if status in _PASSING or status >= 500:
        return RequestFailed(reason, is_passing=True, status=status)
    where = (
        f"; check {argument('EndpointJudge.model')} and {argument('EndpointJudge.base_url')}" if status == 404 else ""
    )
    return RequestFailed(reason + where, status=status, argument="model")


def _no_log_probs(what: str) -> RequestFailed:
    return RequestFailed(
        f"{what}: set {argument('GEvalScorer.score_mode')}=sample, or name a model that gives log-probs",
        argument="model",
    )
