"""A worker process seen from inside: waits for its turns, and answers the program that hands them out.

``python -m benchmarks.worker MODULE SETTINGS`` calls ``MODULE.work(settings, channel)``, where settings are JSON. The
module is imported only once its output is turned away from the pipe, since libraries print as they are imported.
"""

import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from tiltmeter.errors import UserError


class Channel:
    """The worker's end of the pipe; what libraries print is turned away from it."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._turns = threading.Semaphore(0)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for _ in sys.stdin:
            self._turns.release()
        os._exit(1)  # the program that hands out turns has gone

    def send(self, **message: Any) -> None:
        """One message to the program."""
        print(json.dumps(message), file=self._out, flush=True)

    def wait_for_turn(self) -> None:
        """Wait without using any CPU."""
        self._turns.acquire()


class Turns:
    """Counts a training loop's optimizer steps, and stops its clock and the loop itself between turns.

    Args:
        lengths: optimizer steps of each turn; the first turn has begun already, with whatever comes before its steps.
        channel: to the program that hands out turns.
        synchronize: waits for the device before the clock is read.
    """

    def __init__(self, lengths: Sequence[int], channel: Channel, synchronize: Callable[[], None]) -> None:
        self._left, *self._lengths = lengths
        self._channel = channel
        self._synchronize = synchronize
        self._started = time.perf_counter()

    def before_step(self) -> None:
        """To be called at the start of every optimizer step."""
        if self._left == 0:
            self.end()
            self._left = self._lengths.pop(0)
            self._started = time.perf_counter()
        self._left -= 1

    def end(self) -> None:
        """Report the turn's seconds and wait: for the next turn or, after the last one, until nobody is timed any more.

        To be called after the last optimizer step; what a process does on its way out would else run beside others' turns.
        """
        self._synchronize()
        self._channel.send(seconds=time.perf_counter() - self._started)
        self._channel.wait_for_turn()


def serve(module: str, settings: str) -> None:
    """Do a module's ``work``, then send its summary, or one line that says what failed."""
    channel = Channel()
    try:
        work = importlib.import_module(module).work
        channel.send(ready=True)
        channel.wait_for_turn()
        channel.send(**work(json.loads(settings), channel))
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())[:300]
        channel.send(error=text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")
        sys.exit(1)


if __name__ == "__main__":
    serve(*sys.argv[1:])
