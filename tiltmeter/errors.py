"""Errors that end a program with one line: failed write (code 1), wrong input (2), missing scores (3), bad numbers (4), signal."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from signal import Signals

from tiltmeter.commands import setting

_shown: ContextVar[Callable[[str], str]] = ContextVar("shown", default=lambda name: name.rpartition(".")[2])
"""From ``Decoding.top_p`` to what messages call it."""


def argument(name: str) -> str:
    """Name of an argument as the reader of a message sets it: by itself, or the configuration key where a command runs.

    Args:
        name: the function or class that takes it, and its own name.

    >>> argument("Decoding.top_p")
    'top_p'
    """
    return _shown.get()(name)


@contextmanager
def arguments_shown(how: Callable[[str], str]) -> Iterator[None]:
    """Inside, :func:`argument` gives what ``how`` makes of ``Decoding.top_p``; another thread has to be given the context."""
    token = _shown.set(how)
    try:
        yield
    finally:
        _shown.reset(token)


@contextmanager
def arguments_forwarded(by: Mapping[str, str]) -> Iterator[None]:
    """Inside, messages name the argument that a caller passed on: ``{"CausalLM.name_or_path": "LocalJudge.model"}``."""
    outer = _shown.get()
    with arguments_shown(lambda name: outer(by.get(name, name))):
        yield


class UserError(ValueError):
    """Wrong input or configuration: shown as one line without a traceback, exit code 2.

    The message says what is wrong, what was expected, what was found and what to do, and starts with the file
    or the argument (:func:`argument`) it is about: ``top_p: expected above 0 and at most 1, got 2``.
    """


class Unsupported(UserError):
    """Something that a model's family can't do, whatever the options; a report leaves such an analysis out by name."""


class FailedWrite(OSError):
    """A file could not be written, whatever the library raised: one line, exit code 1.

    Args:
        path: the file or folder that is not there now, or as it was before.
        reason: in the system's words, as far as they are known.
        line: another message.
    """

    def __init__(self, path: Path, reason: str, line: str | None = None) -> None:
        super().__init__(line or f"{path}: could not be written ({reason})")
        self.path, self.reason, self.strerror = path, reason, reason

    def __reduce__(self) -> tuple[type["FailedWrite"], tuple[Path, str, str]]:
        """Sent from process to process as it is."""
        return type(self), (self.path, self.reason, str(self))


class NumericalStop(RuntimeError):
    """Loss or gradient were not finite for too many steps, or weights are lost: one line, exit code 4, nothing exported."""


class IncompleteEvaluation(RuntimeError):
    """Too many scores of a figure are missing: shown as one line, exit code 3; everything that could be scored is kept."""


class Preempted(BaseException):
    """A signal asked the run to stop and it did, on all processes: shown as one line, exit code 143.

    No ``Exception``, since it may be raised anywhere, where no library shall take it for a failure of its own.

    Args:
        signal: that asked for it.
        after_step: optimizer steps taken; 0: none.
        checkpoint: what was written; None: nothing new.

    >>> print(Preempted(Signals.SIGTERM, after_step=12, checkpoint="run/last.ckpt"))
    stopped by SIGTERM after step 12; go on with ckpt_path=run/last.ckpt
    """

    def __init__(self, signal: Signals, *, after_step: int = 0, checkpoint: str | None = None) -> None:
        self.signal = signal
        self.checkpoint = checkpoint
        kept = "nothing new to keep" if checkpoint is None else f"go on with {setting('ckpt_path', checkpoint)}"
        super().__init__(f"stopped by {signal.name} after step {after_step}; {kept}")
