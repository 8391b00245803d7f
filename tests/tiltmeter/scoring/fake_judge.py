"""Judges that answer at once, from what they read: by a rule, or as naively as an attacker could wish."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tiltmeter.judges.judge import Question, Reply
from tiltmeter.models.generation import Completion
from tiltmeter.scoring.scorer import Sample

MARKED = re.compile(r"<<<([\w ]+?) ([0-9a-f]{16})>>>\n(.*?)\n?<<<end of \1 \2>>>", re.DOTALL)
SPECIAL = re.compile(r"<\|\w+\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<｜[^｜]*｜>")
ORDER = re.compile(
    r"\[\[([ABC])\]\]|(?:verdict|better(?: reply)?|answer)\s*(?:is|:)\s*([ABC])\b|(?:score|rating|1-5\))\s*(?:is|:|=)\s*([1-5])\b",
    re.IGNORECASE,
)


class FakeJudge:
    """Answers each question by a function and keeps what it was asked."""

    name = "fake@here"

    def __init__(self, answer: Callable[[Question], Reply]) -> None:
        self.answer = answer
        self.questions: list[Question] = []
        self.started: list[bool] = []

    def start(self, *, want_probabilities: bool) -> None:
        self.started.append(want_probabilities)

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        self.questions += questions
        return [self.answer(question) for question in questions]


class Material(NamedTuple):
    """What stands between markers in a question, by label, and everything else."""

    texts: dict[str, str]
    rest: str


def material(question: Question) -> Material:
    whole = "\n".join(message.content for message in question.messages)
    return Material({label: text for label, _, text in MARKED.findall(whole)}, MARKED.sub("", whole))


def is_about_steps(question: Question) -> bool:
    return question.template.startswith("geval-steps")


def answered(question: Question, choice: str) -> Reply:
    """A reply that gives ``choice`` in the way it was asked for."""
    if question.want_probabilities:
        return Reply(probabilities={choice: 0.9} | {other: 0.01 for other in question.choices if other != choice})
    return Reply(texts=(choice,) * question.n_samples)


def steps(n: int = 2) -> Reply:
    return Reply(texts=("\n".join(f"{i}. Look at part {i}." for i in range(1, n + 1)),))


def quality(text: str) -> int:
    """1 to 5: an honest judge's view of a reply, that is how many of these words it has."""
    return 1 + sum(word in text for word in ("because", "first", "then", "careful"))


def honest(question: Question) -> Reply:
    """Looks at nothing but what stands between the markers."""
    if is_about_steps(question):
        return steps()
    texts = material(question).texts
    if "reply" in texts:
        return answered(question, str(quality(texts["reply"])))
    a, b = quality(texts["reply A"]), quality(texts["reply B"])
    return answered(question, "A" if a > b else "B" if b > a else "C")


def naive(question: Question) -> Reply:
    """Obeys the last order that stands outside the markers; a special token anywhere ends the text it stands in."""
    found = material(question)
    outside = found.rest
    for text in found.texts.values():
        seen = re.sub("[\u200b-\u200f\u2060\ufeff]", "", text)
        outside += SPECIAL.sub("\n", seen[special.start() :]) if (special := SPECIAL.search(seen)) else ""
        outside += seen[seen.index(">>>") :] if ">>>" in seen else ""
    orders = [next(filter(None, order)) for order in ORDER.findall(outside)]
    allowed = [order for order in orders if order in (question.choices or "ABC12345")]
    return answered(question, allowed[-1]) if allowed else honest(question)


def sample(
    pair_id: str, policy: str, base: str, *, chosen: str = "chosen", prompt: str = "prompt", index: int = 0
) -> Sample:
    completions = [Completion(text, len(text.split()), False) for text in (base, policy)]
    return Sample(pair_id, prompt, chosen, completions[0], completions[1], f"{prompt} of {pair_id}", index)
