"""A coroutine in an event loop of its own thread, for callers that have none, or one that must not stand still."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_GRACE = 1.0
"""Seconds that a coroutine has to wind up after the deadline."""


class _End(Generic[T]):
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def emitted_in_thread(
    main: Callable[[Callable[[T], None]], Coroutine[Any, Any, None]], *, deadline: float
) -> Iterator[T]:
    """Run ``main(emit)`` in another thread and yield what it emits until it ends.

    Args:
        deadline: on the clock of :func:`time.monotonic`. A coroutine that does not end a second after it (a name look-up that
            hangs can't be cancelled) is left behind in its thread, which does not keep the process alive.

    Raises:
        Exception: what ``main`` raised.

    >>> async def main(emit):
    ...     emit(1)
    >>> list(emitted_in_thread(main, deadline=time.monotonic() + 10))
    [1]
    """
    arrived: SimpleQueue[T | _End[T]] = SimpleQueue()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def whole() -> None:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        await main(arrived.put)

    def run() -> None:
        try:
            asyncio.run(whole())
        except BaseException as error:  # for the caller's thread to raise
            arrived.put(_End(error))
        else:
            arrived.put(_End())

    threading.Thread(target=copy_context().run, args=(run,), name="judge", daemon=True).start()
    try:
        while True:
            item = arrived.get(timeout=max(0.0, deadline + _GRACE - time.monotonic()))
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    except Empty:
        return
    finally:
        for loop, task in running:
            with suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(task.cancel)
