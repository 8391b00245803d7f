"""Signals that ask a run to stop, as a flag that can be looked at between two steps."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from tiltmeter.errors import Preempted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""The most urgent last: where processes got different ones, that one counts."""
SAME_SECONDS = 1.0
"""A signal that comes again sooner is the same one: a scheduler and torchrun may both send it to every process."""


class StopSignals:
    """Between :meth:`install` and :meth:`restore`, the first signal is kept, and a second one ends the process at once."""

    def __init__(self) -> None:
        self.has_work = False
        """Whether there is anything to finish; as long as there is none, a signal raises Preempted where it comes."""
        self._received: tuple[signal.Signals, float] | None = None
        self._handlers_before: dict[signal.Signals, Any] = {}

    @property
    def code(self) -> int:
        """0: no signal came; i + 1: the i-th of :data:`SIGNALS` did."""
        return 0 if self._received is None else 1 + SIGNALS.index(self._received[0])

    def install(self) -> None:
        """Take the signals over; in another thread than the main one, which Python doesn't let, leave them as they are."""
        if threading.current_thread() is threading.main_thread():
            self._handlers_before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def restore(self) -> None:
        """Give them back."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._handlers_before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.has_work:
            raise Preempted(signal.Signals(number))
        if self._received is None:
            self._received = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._received[1] > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
