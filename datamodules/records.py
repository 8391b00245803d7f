"""The one shape that every source of preferences yields, and the account of what a source dropped."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tiltmeter.errors import UserError

Role = Literal["user", "assistant", "system"]
AttributeValue = str | int | float | bool


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue; ``content`` carries no role marker, and outer white space only where a file of messages does."""

    role: Role
    content: str


@dataclass(frozen=True)
class PreferencePair:
    r"""One prompt and two responses of which ``chosen`` was preferred.

    The same pair in two forms. As messages: ``prompt`` (ends with a user turn), ``chosen`` and ``rejected`` (the
    assistant's words). As exact text: ``prompt_text + chosen_text`` and ``prompt_text + rejected_text`` are the two
    transcripts, character for character as the source has them (or, where the source has no transcript form, in the
    ``\n\nHuman: … \n\nAssistant:`` form of Anthropic HH, see :func:`transcript`).
    """

    pair_id: str
    """Identifier, unique within the source and stable across runs, for example ``hh/harmless-base_test/00017``."""
    source: str
    """Name used for metrics per source, for example ``hh/harmless-base_test``, ``oasst1`` or ``synthetic``."""
    group: str
    """Pairs with equal group never fall on two sides of the train/validation split (same prompt, same tree)."""
    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    prompt_text: str
    chosen_text: str
    rejected_text: str
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    """Values that the source knows beyond the text: rank gap, planted attributes, whether the label was flipped …"""
    held_out: bool = False
    """Never trained on. A source with such pairs gives validation and probe these and training the others."""


@dataclass
class LoadReport:
    """Counts of what a source read, kept and dropped; printed as one table before training starts."""

    source: str
    location: str
    """Place it was read from: a path, or ``hub:NAME@REVISION``, or ``seed 0``."""
    n_rows: int = 0
    n_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason → number of rows; reasons are short phrases such as ``identical responses``."""
    notes: dict[str, str] = field(default_factory=dict)
    """Further lines of the report by name, for example ``revision`` or ``label noise: 10 % of training pairs``."""


def score_margins(all_attributes: Iterable[Mapping[str, AttributeValue]]) -> list[float] | None:
    """By how much each pair's chosen response was scored higher (``score_margin``), NaN: not known; None: of no pair."""
    margins = [float(attributes.get("score_margin", math.nan)) for attributes in all_attributes]
    return None if all(map(math.isnan, margins)) else margins


class PreferenceSource(Protocol):
    """A source of pairs: Anthropic HH, OASST1, people's own files, the synthetic world, or a mixture of them."""

    name: str

    def load(self) -> tuple[list[PreferencePair], list[LoadReport]]:
        """All pairs in a fixed order, with one report per file or subset. Raises UserError on bad input."""
        ...


def load_pairs(source: PreferenceSource) -> tuple[list[PreferencePair], list[LoadReport]]:
    """Load a source's pairs. Raises UserError: what the source raises, or it is none."""
    if not callable(getattr(source, "load", None)):
        raise UserError(
            f"data: {type(source).__name__} is no source of preferences, it has no load(); docs/data.md has an example"
        )
    return source.load()


def transcript(prompt: tuple[Message, ...], response: str) -> tuple[str, str]:
    r"""Exact text of a dialogue in the form of Anthropic HH: (prompt text, response text).

    >>> transcript((Message("user", "Hi"),), "Hello.")
    ('\n\nHuman: Hi\n\nAssistant:', ' Hello.')
    """
    marker = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": "\n\nSystem: "}
    return "".join(marker[m.role] + m.content for m in prompt) + "\n\nAssistant:", " " + response


_TURN = re.compile(r"\n\n(Human|Assistant|System):")
_ROLES: Mapping[str, Role] = {"Human": "user", "Assistant": "assistant", "System": "system"}


def messages_of(prompt_text: str) -> tuple[Message, ...]:
    r"""Turns of a prompt that ends where the assistant is to speak, as :func:`transcript` writes it; none: it is no transcript.

    >>> [m.role for m in messages_of("\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:")]
    ['user', 'assistant', 'user']
    >>> messages_of("Once upon a time")
    ()
    """
    before, *parts = _TURN.split(prompt_text)
    roles, contents = parts[0::2], [text.strip() for text in parts[1::2]]
    if before.strip() or len(roles) < 2 or roles[-1] != "Assistant" or contents[-1] or not all(contents[:-1]):
        return ()
    return tuple(Message(_ROLES[role], text) for role, text in zip(roles[:-1], contents[:-1], strict=True))
