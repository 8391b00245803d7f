"""Ctrl-C: it ends a command without a traceback, also while the libraries are still being imported.

Importing this module gives SIGINT its plain effect, the end of the process; :func:`interrupts_end_commands` takes over from there.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit code that shells give a program which Ctrl-C ended."""
_IS_HEARD = signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""False where whoever started this process has it ignore SIGINT, or Python has no say."""


@contextmanager
def interrupts_end_commands() -> Iterator[None]:
    """Inside, Ctrl-C ends the process with one line and exit code 130."""
    if _IS_HEARD:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed again while Python ends
        print("tiltmeter: stopped by Ctrl-C", file=sys.stderr, flush=True)  # noqa: T201
        sys.exit(INTERRUPTED)


if _IS_HEARD:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
