"""Plain forms of the marks of tables and messages, for terminals whose encoding lacks a character; and hints at likely words."""

import codecs
import difflib
import sys
import unicodedata
from collections.abc import Iterable

_MARKS = {
    **dict(zip("–−—‑·•…×→’‘“”‹›‖⟨⟩≈√█━", "----.*~x>''\"\"<>|<>~v#-", strict=True)),
    **dict(zip("ΔΣδβγεθλπρσαℓ∂∇", "DSdbgehlprsaldV", strict=True)),
    **{"≤": "<=", "≥": ">=", "±": "+-", "∞": "inf"},
}
"""One column where it can be, so that tables stay straight."""
_HANDLER = "tiltmeter.plain"


def allow_any_encoding() -> None:
    """Let standard output and errors take every text: what their encoding lacks is printed plainly instead of raising."""
    codecs.register_error(_HANDLER, _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


def plain(text: str) -> str:
    r"""ASCII for a text: marks in their plain form, digits of any height, everything else escaped, so that a path is never another.

    >>> plain("ΔH² = 0.1 … 0.3 – ü 的")
    'DH2 = 0.1 ~ 0.3 - \\xfc \\u7684'
    """
    return "".join(map(_plain_character, text))


def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    kind = unicodedata.category(character)
    if kind == "Mn":  # a bar or hat over the letter before it
        return ""
    small = unicodedata.normalize("NFKD", character) if kind in ("No", "Lm") else ""
    if len(small) == 1 and small.isascii():
        return small
    return _MARKS.get(character, character.encode("ascii", "backslashreplace").decode("ascii"))


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return plain(error.object[error.start : error.end]), error.end


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """End of a message that offers the known word most like this one; empty where none is like it.

    >>> did_you_mean("sead", ["seed", "name"])
    '; did you mean seed?'
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""
