"""Errors that end a program with one line: failed write (code 1), wrong input (2), missing scores (3), bad numbers (4), signal."""

from pathlib import Path
from signal import Signals

from tiltmeter.commands import setting


class UserError(ValueError):
    """Wrong input or configuration: shown as one line without a traceback, exit code 2.

    The message says what is wrong, what was expected, what was found and what to do, and starts with the configuration
    key or the file it is about: ``data.path: no such file: hh/test.jsonl (expected .jsonl, .jsonl.gz or a folder of them)``.
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
