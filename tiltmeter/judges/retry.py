"""What can go wrong with a request to a judge, which of it is worth another try, and how long to wait before."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from random import Random

import openai

from tiltmeter.judges.judge import Failure
from tiltmeter.judges.redaction import shown

_LONGEST_WAIT = 30.0
_FIRST_WAIT = 0.5
_PASSING = (408, 409, 429)
_HOPELESS = ("insufficient_quota", "billing_hard_limit_reached")
"""Codes of a 429 that no waiting mends."""


class RequestFailed(Exception):
    """A request brought no answer.

    Args:
        failure, reason: as in :class:`tiltmeter.judges.judge.Reply`; the reason is redacted.
        is_passing: whether the same request may work later.
        status: HTTP status, where there was one.
        retry_after: seconds that the server asks to wait.
        key: the configuration key (behind ``judge.``) that is probably wrong; empty: none.
    """

    def __init__(
        self,
        reason: str,
        *,
        failure: Failure = "api",
        is_passing: bool = False,
        status: int | None = None,
        retry_after: float | None = None,
        key: str = "",
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.failure = failure
        self.is_passing = is_passing
        self.status = status
        self.retry_after = retry_after
        self.key = key


@dataclass(frozen=True)
class Retries:
    """When to try again. ``sleep`` is there for tests.

    The random numbers are its own: waiting must not change what a training run draws.
    """

    most: int
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    rng: Random = field(default_factory=Random, repr=False)

    def wait_before(self, retry: int, failed: RequestFailed) -> float:
        """Seconds before the ``retry``-th retry (from 0): what the server asks, else uniform in [0, min(30, 0.5 · 2^retry)]."""
        if failed.retry_after is not None:
            return failed.retry_after
        return self.rng.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2**retry))


def failed_request(error: Exception, secrets: list[str], *, asked_for_log_probs: bool, timeout: float) -> RequestFailed:
    """What an exception of the client means."""
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
            key="base_url",
        )
    if asked_for_log_probs and 400 <= status < 500 and "logprob" in reason.replace("_", "").lower():
        return RequestFailed(
            f"{reason}; it gives no log-probs: set judge.score_mode=sample", status=status, key="model"
        )
    if status in (401, 403) or error.code in _HOPELESS:
        return RequestFailed(reason, status=status, key="api_key_env")
    if status in _PASSING or status >= 500:
        wait = seconds_to_wait(error.response.headers.get("retry-after"), now=datetime.now(UTC))
        return RequestFailed(reason, is_passing=True, status=status, retry_after=wait)
    where = "; check judge.model and judge.base_url" if status == 404 else ""
    return RequestFailed(reason + where, status=status, key="model")


def seconds_to_wait(retry_after: str | None, *, now: datetime) -> float | None:
    """Seconds that a ``Retry-After`` header asks for, in seconds or as an HTTP date; None: no such header, or not readable.

    >>> now = datetime(2026, 10, 21, 7, 28, tzinfo=UTC)
    >>> [seconds_to_wait(x, now=now) for x in ("2.5", "Wed, 21 Oct 2026 07:28:30 GMT", "soon", "-1", "nan")]
    [2.5, 30.0, None, 0.0, None]
    """
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            then = parsedate_to_datetime(retry_after)
        except ValueError:
            return None
        seconds = (then.replace(tzinfo=then.tzinfo or UTC) - now).total_seconds()
    return max(0.0, seconds) if seconds == seconds else None
