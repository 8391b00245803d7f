"""What a model says: the same prompts, decoding and random numbers for every model that is compared."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """What a model said after a prompt."""

    text: str
    """Decoded without special tokens."""
    n_tokens: int
    """Tokens generated, the end-of-sequence token not counted."""
    is_cut: bool
    """Whether it was cut at the token limit, before the model ended it."""

    @property
    def is_empty(self) -> bool:
        """Nothing that could be read."""
        return not self.text.strip()
