"""Answers of a judge as weights of the allowed choices: from the probabilities of the first token, or from the last line.

What a judge writes before its last line, and whatever stands in the text it judges, is never looked at for a verdict.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tiltmeter.errors import UserError
from tiltmeter.judges.judge import Failure, Judge, Question, Reply
from tiltmeter.scoring.scorer import Figure, Side, notice

LOW_MASS = 0.5
"""Below this weight on all choices together, the judge mostly wanted to say something else."""


@dataclass(frozen=True)
class Answer:
    """A judge's choice.

    Args:
        weights: choice → probability, or share of the samples drawn; what was not a choice is missing from the sum.
        failure: why there is no answer; None: there is one.
        reason: the failure in words.
    """

    weights: dict[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    reason: str = ""

    @property
    def mass(self) -> float:
        """Weight on all choices together, 1 where nothing else was said."""
        return sum(self.weights.values())


def read_answer(question: Question, reply: Reply, choices: Sequence[str]) -> Answer:
    """The answer in a reply: its probabilities where they were asked for, else the last line of each text."""
    if reply.failure is not None:
        return Answer(failure=reply.failure, reason=reply.reason)
    if question.want_probabilities:
        if reply.probabilities is None:
            return Answer(failure="api", reason="the judge gave no probabilities")
        weights = {choice: reply.probabilities.get(choice, 0.0) for choice in choices}
        heard = "no choice is among the likeliest first tokens"
    else:
        last = Counter(last_line_choice(text, choices) for text in reply.texts)
        weights = {choice: last[choice] / len(reply.texts) for choice in choices if last[choice]}
        heard = "the last line is not one of the choices"
    if not sum(weights.values()):
        return Answer(failure="parse", reason=f"{heard} {', '.join(choices)}")
    return Answer(weights)


def last_line_choice(text: str, choices: Sequence[str]) -> str | None:
    r"""The choice that the last line with anything in it consists of, with or without a label before it; None: it isn't one.

    >>> last_line_choice("B is longer, but wrong.\nBetter: **A**", ["A", "B"]), last_line_choice("A or B", ["A", "B"])
    ('A', None)
    """
    lines = [line.strip(" \t*_`\"'.") for line in text.splitlines()]
    last = next((line for line in reversed(lines) if line), "")
    found = re.fullmatch(rf"(?:- )?(?:[^\W\d_][\w ()-]{{0,40}}:[\s*]*)?({'|'.join(map(re.escape, choices))})", last)
    return found[1] if found else None


def ask_choices(judge: Judge, questions: Sequence[Question], choices: Sequence[str]) -> list[Answer]:
    """Ask all questions; those whose reply can't be read are asked once more, with the choices said again."""
    replies = judge.ask(questions) if questions else []
    answers = [read_answer(q, reply, choices) for q, reply in zip(questions, replies, strict=True)]
    unread = [i for i, answer in enumerate(answers) if answer.failure == "parse"]
    again = [reminded(questions[i], f"End with one of {', '.join(choices)}, alone.") for i in unread]
    if again:
        for i, question, reply in zip(unread, again, judge.ask(again), strict=True):
            answers[i] = read_answer(question, reply, choices)
    return answers


def reminded(question: Question, reminder: str) -> Question:
    """Reworded question, so that no cache has the answer that could not be read."""
    *before, last = question.messages
    return replace(question, messages=(*before, last._replace(content=f"{last.content}\n({reminder})")))


def checked_prefix(key: str, prefix: str) -> str:
    """A prefix of figures' names, checked.

    Raises:
        UserError: not letters, digits and underscores.
    """
    if not re.fullmatch(r"[a-z]\w*", prefix, re.ASCII):
        raise UserError(f"{key}: expected letters, digits and underscores such as geval, got {prefix!r}")
    return prefix


def missing_figures(name: str, of: Side, failures: Sequence[Failure | None], *, scorer: str) -> list[Figure]:
    """Number of missing scores for each reason there was, as ``<name>_missing/<reason>``."""
    counts = Counter(failure for failure in failures if failure)
    nan = float("nan")
    return [
        Figure(f"{name}_missing/{reason}", of, n, nan, nan, len(failures) - counts.total(), counts.total(), scorer)
        for reason, n in sorted(counts.items())
    ]


def warn_of_missing(name: str, failures: Sequence[tuple[Failure, str]], n: int, limit: float) -> None:
    """Say why a figure is NaN, where more than the allowed share is missing, with the most frequent reason."""
    if len(failures) > limit * n:
        (kind, reason), _ = Counter(failures).most_common(1)[0]
        notice(
            f"{name}: {len(failures)} of {n} missing, more than {limit:.0%}, so the figure is NaN; most often {kind}: {reason}"
        )
