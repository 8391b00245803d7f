"""Limits on a judge's requests, tokens and money, checked before each request against the most it could use."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tiltmeter.errors import UserError, argument

PRICE_NAMES = ("input", "output")
_TOKENS_A_MESSAGE = 16
_TOKENS_A_REQUEST = 64
"""Tokens that chat templates put around messages, amply."""


class Tokens(NamedTuple):
    """Tokens of one request or of many."""

    prompt: int
    completion: int

    def plus(self, other: "Tokens") -> "Tokens":
        """Sum of two usages."""
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def times(self, n: int) -> "Tokens":
        """Tokens of so many equal requests."""
        return Tokens(self.prompt * n, self.completion * n)


@dataclass
class Usage:
    """Requests, tokens and money that a judge has used since it was made.

    Tokens are the server's count; where a request brought none (it timed out, say, or was tried again) the most it can
    have used.
    """

    requests: int = 0
    retries: int = 0
    """Requests that repeated a failed one; counted in ``requests`` too."""
    cached: int = 0
    """Questions answered from the cache, without a request."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float | None = None
    """None: no prices were given."""


class OverBudget(Exception):
    """The next request could exceed a limit.

    Args:
        limit: its name, such as ``max_tokens``.
        most: its value.
    """

    def __init__(self, limit: str, most: int | float) -> None:
        super().__init__(f"the next request could exceed {argument(f'EndpointJudge.{limit}')}={most:g}")
        self.limit = limit


class Budget:
    """Limits on requests, tokens and US dollars; None: no limit.

    A request reserves the most that it could use and is told afterwards what it did use. One that fits only if those
    under way use less than they reserved must wait for them, so the number of requests at a time does not change what is
    asked. Once a request did not fit, no other is let through: the short ones alone would be no fair sample.

    Args:
        prices: US dollars per million tokens, ``{"input": …, "output": …}``.

    Raises:
        UserError: a limit or a price that is none, or ``max_usd`` without prices.
    """

    def __init__(
        self,
        *,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        max_usd: float | None = None,
        prices: Mapping[str, float] | None = None,
    ) -> None:
        limits = {"max_requests": max_requests, "max_tokens": max_tokens, "max_usd": max_usd}
        for name, value in limits.items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{argument(f'EndpointJudge.{name}')}: expected a number above 0 or null, got {value}")
        if prices is not None and not _are_prices(prices):
            raise UserError(
                f"{argument('EndpointJudge.prices')}: expected US dollars per million tokens as {{input: …, output: …}}, got "
                f"{dict(prices)}"
            )
        if max_usd is not None and prices is None:
            raise UserError(
                f"{argument('EndpointJudge.max_usd')}: needs {argument('EndpointJudge.prices')} (US dollars per million tokens: "
                "{input: …, output: …})"
            )
        self._limits = {name: value for name, value in limits.items() if value is not None}
        self._prices = prices
        self._reserved, self._reserved_requests = Tokens(0, 0), 0
        self._over: str | None = None
        """The limit that ended it."""
        self.usage = Usage(usd=None if prices is None else 0.0)

    def reserve(self, tokens: Tokens, *, tries: int = 1) -> int:
        """Count in a request, each try of which may use ``tokens``.

        Returns:
            the tries that fit, at most ``tries``; 0: it must wait until a request under way is settled, then ask again.

        Raises:
            OverBudget: even one could exceed a limit, or an earlier request could have.
        """
        if self._over is None:
            self._over = self._exceeded(self._spent.plus(tokens), self.usage.requests + 1)
        if self._over is not None:
            raise OverBudget(self._over, self._limits[self._over])
        under_way, n = self._spent.plus(self._reserved), self.usage.requests + self._reserved_requests
        while tries and self._exceeded(under_way.plus(tokens.times(tries)), n + tries) is not None:
            tries -= 1
        self._reserved = self._reserved.plus(tokens.times(tries))
        self._reserved_requests += tries
        return tries

    def settle(self, reserved: Tokens, used: Tokens, *, tries: int = 1, taken: int = 1) -> None:
        """Replace what a request reserved (``tries`` of ``reserved``) with what it used in the tries that it took."""
        self._reserved = self._reserved.plus(reserved.times(-tries))
        self._reserved_requests -= tries
        spent = self._spent.plus(used)
        self.usage.requests += taken
        self.usage.retries += taken - 1
        self.usage.prompt_tokens, self.usage.completion_tokens = spent
        self.usage.usd = self._cost(spent)

    @property
    def _spent(self) -> Tokens:
        return Tokens(self.usage.prompt_tokens, self.usage.completion_tokens)

    def _cost(self, tokens: Tokens) -> float | None:
        if self._prices is None:
            return None
        dollars = tokens.prompt * self._prices["input"] + tokens.completion * self._prices["output"]
        return dollars / 1e6

    def _exceeded(self, tokens: Tokens, requests: int) -> str | None:
        """Name of the limit that so many tokens and requests in total would exceed."""
        totals = {"max_requests": requests, "max_tokens": sum(tokens), "max_usd": self._cost(tokens) or 0.0}
        for name, limit in self._limits.items():
            if totals[name] > limit:
                return name
        return None


def most_tokens(messages: list[str], *, n: int, max_tokens: int) -> Tokens:
    """The most tokens that a request can use: no tokenizer makes more tokens of a text than it has UTF-8 bytes.

    >>> most_tokens(["Is it good?"], n=2, max_tokens=5)
    Tokens(prompt=91, completion=10)
    """
    prompt = _TOKENS_A_REQUEST + sum(len(text.encode("utf-8", "replace")) + _TOKENS_A_MESSAGE for text in messages)
    return Tokens(prompt, n * max_tokens)


def _are_prices(given: Mapping[str, float]) -> bool:
    """Whether there is one price for each of :data:`PRICE_NAMES`, from 0."""
    return set(given) == set(PRICE_NAMES) and all(
        isinstance(x, int | float) and 0 <= x < math.inf for x in given.values()
    )
