"""Make what strangers say fit to be shown: no secrets, one line, nothing a terminal would obey."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import quote

REDACTED = "[redacted]"
_KEY_LIKE = re.compile(r"\bBearer\s+[^\s\"',;\]}]+|\bsk-[\w*.-]{4,}")
"""Keys that we do not know: the header they come in, and OpenAI's spelling, also half masked as in its error messages."""
_SHORTEST = 8
"""Shortest key that is redacted: shorter ones are placeholders such as EMPTY, a word that answers may hold."""


def without(text: str, secrets: Sequence[str]) -> str:
    """The text without the secrets of 8 characters or more, also where they are percent-encoded.

    >>> without("key=a%2Fb-c-d-e", ["a/b-c-d-e"])
    'key=[redacted]'
    """
    for secret in secrets:
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, REDACTED).replace(quote(secret, safe=""), REDACTED)
    return text


def shown(text: str, secrets: Sequence[str] = (), *, limit: int = 200) -> str:
    r"""The text as part of a message: one printable line without secrets or anything like a key, at most ``limit`` long.

    >>> shown("no such key:\n sk-ab****yz \x1b[31m"), shown("bad header: Bearer abc")
    ('no such key: [redacted] [31m', 'bad header: [redacted]')
    """
    line = " ".join(_KEY_LIKE.sub(REDACTED, without(text, secrets)).split())
    printable = "".join(character for character in line if character.isprintable())
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


@contextmanager
def redacted_logs(packages: Sequence[str], secrets: Sequence[str]) -> Iterator[None]:
    """Keep secrets out of what the loggers of some packages say meanwhile; at level DEBUG they tell all headers of a response."""

    def without_secrets(record: logging.LogRecord) -> bool:
        record.msg, record.args = without(record.getMessage(), secrets), None
        return True

    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in packages]
    for name in names:
        logging.getLogger(name).addFilter(without_secrets)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeFilter(without_secrets)
