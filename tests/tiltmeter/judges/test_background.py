import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from tests.processes import HANGS
from tiltmeter.judges.background import emitted_in_thread


def soon() -> float:
    return time.monotonic() + HANGS


def test_what_is_emitted_comes_in_order_from_another_thread() -> None:
    async def main(emit: Callable[[int], None]) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
            emit(threading.get_ident())

    (thread,) = set(emitted_in_thread(main, deadline=soon()))
    assert thread != threading.get_ident()


def test_an_exception_comes_out_after_what_was_emitted_before() -> None:
    async def main(emit: Callable[[int], None]) -> None:
        emit(1)
        raise KeyError("why")

    arriving = emitted_in_thread(main, deadline=soon())
    assert next(arriving) == 1
    with pytest.raises(KeyError, match="why"):
        next(arriving)


def test_who_stops_listening_stops_the_coroutine() -> None:
    cancelled = threading.Event()

    async def main(emit: Callable[[int], None]) -> None:
        emit(1)
        try:
            await asyncio.sleep(HANGS)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    for _ in emitted_in_thread(main, deadline=soon()):
        break
    assert cancelled.wait(HANGS)


def test_a_coroutine_that_does_not_end_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiltmeter.judges.background._GRACE", 0.05)
    released = threading.Event()

    async def main(emit: Callable[[int], None]) -> None:
        emit(1)
        released.wait(HANGS)

    said = (list(emitted_in_thread(main, deadline=time.monotonic() + limit)) for limit in (0.05, 0.5, 5.0, 50.0))
    assert next(filter(None, said)) == [1], "once a thread has had the time to begin"
    released.set()
