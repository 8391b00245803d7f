import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltmeter.errors import UserError
from tiltmeter.judges.budget import Budget, OverBudget, Tokens, most_tokens

tokens = st.builds(Tokens, st.integers(0, 50), st.integers(0, 50))


@given(
    st.lists(st.tuples(tokens, st.floats(0, 1), st.booleans())),
    st.integers(1, 300),
    st.integers(1, 10),
    st.floats(0.0001, 0.01),
)
def test_no_limit_is_ever_exceeded_whatever_runs_at_a_time(
    requests: list[tuple[Tokens, float, bool]], max_tokens: int, max_requests: int, max_usd: float
) -> None:
    prices = {"input": 10.0, "output": 40.0}
    budget = Budget(max_requests=max_requests, max_tokens=max_tokens, max_usd=max_usd, prices=prices)
    running: list[tuple[Tokens, Tokens]] = []
    for most, share, settles_first in requests:
        if settles_first and running:
            budget.settle(*running.pop())
        try:
            if budget.reserve(most):
                running.append((most, Tokens(int(most.prompt * share), int(most.completion * share))))
            else:
                assert running, "nothing to wait for"
        except OverBudget:
            break
    for reserved, used in running:
        budget.settle(reserved, used)
    usage = budget.usage
    assert usage.requests <= max_requests
    assert usage.prompt_tokens + usage.completion_tokens <= max_tokens
    assert usage.usd is not None
    assert usage.usd == pytest.approx((usage.prompt_tokens * 10 + usage.completion_tokens * 40) / 1e6)
    assert usage.usd <= max_usd


def test_one_that_fits_only_if_others_use_less_waits_for_them() -> None:
    budget = Budget(max_tokens=100)
    assert budget.reserve(Tokens(50, 10))
    assert not budget.reserve(Tokens(50, 10))
    budget.settle(Tokens(50, 10), Tokens(20, 1))
    assert budget.reserve(Tokens(50, 10))


def test_as_many_tries_are_reserved_as_fit() -> None:
    budget = Budget(max_tokens=100, max_requests=4)
    assert budget.reserve(Tokens(20, 10), tries=6) == 3
    assert budget.reserve(Tokens(5, 5), tries=6) == 1
    budget.settle(Tokens(20, 10), Tokens(40, 2), tries=3, taken=2)
    assert (budget.usage.requests, budget.usage.retries) == (2, 1)
    assert budget.reserve(Tokens(5, 5), tries=6) == 1


def test_after_one_that_does_not_fit_no_shorter_one_is_let_through() -> None:
    budget = Budget(max_tokens=100)
    for most in (Tokens(100, 1), Tokens(1, 1)):
        with pytest.raises(OverBudget, match=r"max_tokens=100"):
            budget.reserve(most)
    assert budget.usage.requests == 0


@pytest.mark.parametrize("limit", ["max_requests", "max_tokens", "max_usd"])
def test_a_limit_is_a_positive_number(limit: str) -> None:
    with pytest.raises(UserError, match=f"^{limit}: expected a number above 0 or null, got -1"):
        Budget(**{limit: -1.0 if limit == "max_usd" else -1})  # type: ignore[arg-type]


@given(st.lists(st.text(), max_size=3))
def test_no_byte_level_tokenizer_can_make_more_of_a_text(texts: list[str]) -> None:
    assert most_tokens(texts, n=1, max_tokens=1).prompt >= sum(len(text.encode()) for text in texts)
