"""Words of a command line that a person is told to type, as the shell and Hydra's grammar of overrides read them back."""

import re
import shlex
from pathlib import Path

_BARE = re.compile(r"(?!(?:null|true|false|inf|nan)\Z)(?:\.{0,2}/|[a-z_])[\w./-]*", re.ASCII | re.IGNORECASE)
"""Read by Hydra as this very text: no number, no word such as null, nothing of its grammar."""


def setting(key: str, value: str | Path) -> str:
    r"""Word ``key=value`` to be pasted into a shell, quoted for Hydra, and then for the shell, where that is needed.

    >>> print(setting("run", "runs/tiny/2026-01-31"), setting("run", "my runs/a=b"))
    run=runs/tiny/2026-01-31 'run="my runs/a=b"'
    """
    text = str(value)
    if not _BARE.fullmatch(text):
        text = re.sub(r'(\\*)("|\$\{|\Z)', lambda found: found[1] * 2 + (found[2] and f"\\{found[2]}"), text)
        text = f'"{text}"'
    return shlex.quote(f"{key}={text}")


def command(script: str, *overrides: str, **about: str | Path) -> str:
    """Line ``python SCRIPT …`` to be pasted into a shell.

    Args:
        script: its name.
        overrides: as Hydra reads them; quoted for the shell alone, and last.
        about: keys and values as they are.
    """
    return " ".join(["python", script, *(setting(*item) for item in about.items()), *map(shlex.quote, overrides)])
