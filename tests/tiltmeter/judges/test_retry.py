import random
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltmeter.judges.retry import RequestFailed, Retries, seconds_to_wait

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


@given(st.integers(0, 40))
def test_waits_are_uniform_up_to_a_bound_that_doubles_to_half_a_minute(retry: int) -> None:
    most = min(30.0, 0.5 * 2.0**retry)
    waits = [Retries(5, rng=random.Random(seed)).wait_before(retry, RequestFailed("x")) for seed in range(200)]
    assert all(0 <= wait <= most for wait in waits)
    assert min(waits) < 0.1 * most
    assert max(waits) > 0.9 * most


def test_what_the_server_asks_goes_before_chance() -> None:
    assert Retries(5).wait_before(0, RequestFailed("x", retry_after=77.0)) == 77.0


def test_waiting_draws_nothing_from_what_a_training_run_draws_from() -> None:
    retries, failed = Retries(5), RequestFailed("x")
    state = random.getstate()
    retries.wait_before(3, failed)
    assert random.getstate() == state


@given(st.integers(0, 10**6))
def test_a_date_is_read_as_the_seconds_until_then(seconds: int) -> None:
    then = format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)
    assert seconds_to_wait(then, now=NOW) == seconds_to_wait(str(seconds), now=NOW) == seconds


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("", None),
        ("later", None),
        ("nan", None),
        ("-5", 0.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("Sat, 21 Nov 2026 11:59:00 GMT", 0.0),
        ("Sat, 21 Nov 2026 13:00:20 +0100", 20.0),
        ("Sat, 21 Nov 2026 12:00:20 -0000", 20.0),
        ("Sat, 99 Nov 2026 12:00:20 GMT", None),
    ],
)
def test_retry_after(header: str | None, expected: float | None) -> None:
    assert seconds_to_wait(header, now=NOW) == expected
