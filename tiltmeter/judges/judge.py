"""The protocol of a judge: it answers questions about text, in words or as probabilities of a few allowed answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

Failure = Literal["api", "timeout", "budget", "parse"]
"""Why there is no answer. ``parse`` is the asker's verdict on words that came; the others are the judge's."""


class ChatMessage(NamedTuple):
    """One turn of what the judge is told."""

    role: Literal["system", "user"]
    content: str


@dataclass(frozen=True)
class Question:
    """One request to a judge; equal questions have equal answers in the cache.

    Args:
        messages: what the judge reads; text under judgement stands in delimiters already.
        template: name and hash of the prompt template.
        choices: the allowed answers, each a single token where probabilities are wanted; empty: free text.
        want_probabilities: ask for the probabilities of the choices at the first answer token.
        n_samples: answers to draw.
        temperature, top_p, max_tokens: decoding of the answer.
    """

    messages: tuple[ChatMessage, ...]
    template: str
    choices: tuple[str, ...] = ()
    want_probabilities: bool = False
    n_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 16


@dataclass(frozen=True)
class Reply:
    """Reply to a question.

    Args:
        texts: the answers' words, ``n_samples`` of them; fewer, or none, after a failure.
        probabilities: choice → probability at the first answer token, not renormalised (what other tokens got is
            missing from the sum); spellings with a leading space are counted to their choice. None: not asked for or not given.
        failure: why there is no answer; None: there is one.
        reason: the failure in words, without secrets.
    """

    texts: tuple[str, ...] = ()
    probabilities: dict[str, float] | None = None
    failure: Failure | None = None
    reason: str = ""


@runtime_checkable
class Judge(Protocol):
    """Answers questions; see :mod:`tiltmeter.judges.endpoint_judge` and :mod:`tiltmeter.judges.local_judge`."""

    name: str
    """Model and where it runs, as it goes into results: ``gpt-4.1@api.openai.com``, ``local:NAME@REVISION``."""

    def start(self, *, want_probabilities: bool) -> None:
        """Check that the judge can do what will be asked, with one request.

        Raises:
            UserError: no key, a wrong key, no such model, or no probabilities where they are wanted. A judge that is merely
                down is a warning: its answers will be missing until it is back.
        """
        ...

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Answer all questions in bounded time, in their order; what fails comes back as a failure, never as an exception."""
        ...
