"""What asking models takes, said before it starts."""

from typing import NamedTuple


class Cost(NamedTuple):
    """What one part of an analysis takes."""

    name: str
    forwards: float
    """Passes of all its rows through all blocks; parts of a pass count as parts."""
    tokens: int
    """Through all blocks; of completions at most."""
