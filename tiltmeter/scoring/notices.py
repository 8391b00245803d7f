"""Warnings of scorers, which may work in a thread beside training: Python's filters for warnings are those of all threads."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_kept: ContextVar[list[str] | None] = ContextVar("kept", default=None)


def notice(text: str) -> None:
    """Warn now; inside :func:`kept_notices`, let whoever opened it do so."""
    if (kept := _kept.get()) is None:
        warnings.warn(text, stacklevel=3)
    else:
        kept.append(text)


@contextmanager
def kept_notices() -> Iterator[list[str]]:
    """Keep what this thread has to say, for another one that logs it: library code there may just be ignoring all warnings."""
    kept: list[str] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)
