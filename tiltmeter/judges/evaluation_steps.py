"""The steps by which a judge rates: written by it once for each criterion, then frozen, in a file if there is one."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiltmeter.errors import FailedWrite, UserError
from tiltmeter.files import write_json
from tiltmeter.judges.answers import Answer, reminded
from tiltmeter.judges.judge import Judge, Question
from tiltmeter.judges.prompts import STEPS, digest
from tiltmeter.scoring.scorer import notice

_STEP = re.compile(r"\s*(?:\d+[.)]|[-*•])\s+(\S.*)")
_STEPS_TOKENS = 768


class EvaluationSteps:
    """Steps for each criterion, from the user, from a file, or from the judge.

    Args:
        judge: who writes them.
        criteria: name → text.
        file: JSON file to read them from and to keep them in; None: they are asked for in each run.
        given: steps of the user, which the judge is not asked for.

    Raises:
        UserError: steps both given and from a file, for unknown criteria, or none for one of them.
    """

    def __init__(
        self,
        judge: Judge,
        criteria: Mapping[str, str],
        *,
        file: str | None,
        given: Sequence[str] | Mapping[str, Sequence[str]] | None,
    ) -> None:
        self._judge, self._criteria = judge, dict(criteria)
        self._file = None if file is None else Path(file)
        self.found: dict[str, list[str]] = {}
        """Criterion → steps; a criterion whose steps could not be had isn't there."""
        self.missing: dict[str, Answer] = {}
        """Criterion → why its steps could not be had."""
        self._stored: dict[str, Any] = {}
        if given is not None:
            self._take(given)

    def prepare(self) -> None:
        """Have the steps of every criterion, as far as they can be had; what could not be had is asked for next time.

        Raises:
            UserError: the file is damaged, or holds steps of another judge, template or criterion.
        """
        if len(self.found) == len(self._criteria):
            return
        if self._file is not None and self._file.exists():
            self.found |= self._read(self._file)
        lacking = [criterion for criterion in self._criteria if criterion not in self.found]
        if not lacking:
            return
        self._ask(lacking)
        if self._file is not None and not self.found.keys().isdisjoint(lacking):
            self._keep(self._file)
        for criterion in filter(self.missing.__contains__, lacking):
            why = self.missing[criterion]
            notice(
                f"geval: no evaluation steps for {criterion} from {self._judge.name} ({why.failure}: {why.reason}); its "
                "scores are missing until there are"
            )

    def _keep(self, file: Path) -> None:
        try:
            write_json(file, self._stored | {name: self._record(name) for name in self.found})
        except FailedWrite as error:
            notice(f"geval: {error}; evaluation steps are asked for again next time")

    def text(self, criterion: str) -> str:
        """Numbered, a line each."""
        return "\n".join(f"{i}. {step}" for i, step in enumerate(self.found[criterion], 1))

    def digest(self, criterion: str) -> str:
        """Hash of a criterion's text and steps; ``none`` while it has no steps."""
        return digest(self._criteria[criterion], self.text(criterion)) if criterion in self.found else "none"

    def _ask(self, criteria: Sequence[str]) -> None:
        """Ask for steps, and once more where the reply has none."""
        questions = {
            criterion: Question(
                STEPS.fill({"criterion": criterion, "meaning": self._criteria[criterion]}),
                STEPS.id,
                max_tokens=_STEPS_TOKENS,
            )
            for criterion in criteria
        }
        self._listen(questions)
        unread = [
            criterion
            for criterion in criteria
            if criterion in self.missing and self.missing[criterion].failure == "parse"
        ]
        again = "Begin each step on a line of its own with its number and a full stop, and write nothing else."
        if unread:
            self._listen({criterion: reminded(questions[criterion], again) for criterion in unread})

    def _listen(self, questions: Mapping[str, Question]) -> None:
        for criterion, reply in zip(questions, self._judge.ask(list(questions.values())), strict=True):
            steps = parse_steps(reply.texts[0]) if reply.texts else []
            self.missing.pop(criterion, None)
            if reply.failure is not None:
                self.missing[criterion] = Answer(failure=reply.failure, reason=reply.reason)
            elif not steps:
                self.missing[criterion] = Answer(failure="parse", reason="no numbered list of steps in the reply")
            else:
                self.found[criterion] = steps

    def _record(self, criterion: str) -> dict[str, Any]:
        return {"text": self._criteria[criterion], "steps": self.found[criterion]} | self._origin

    @property
    def _origin(self) -> dict[str, str]:
        return {"judge": self._judge.name, "template": STEPS.id}

    def _read(self, file: Path) -> dict[str, list[str]]:
        what_to_do = (
            "give another geval.steps_file, delete this one to have steps written anew, or set geval.evaluation_steps"
        )
        try:
            self._stored = json.loads(file.read_text(encoding="utf-8"))
            found = {name: entry for name, entry in self._stored.items() if name in self._criteria}
            wrong = [name for name, entry in found.items() if not _is_list_of_text(entry["steps"])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file}: expected evaluation steps, found none ({type(error).__name__}); {what_to_do}"
            ) from error
        if wrong:
            raise UserError(f"{file}: expected evaluation steps for {wrong[0]} as a list of texts; {what_to_do}")
        for name, entry in found.items():
            for field, ours in ({"text": self._criteria[name]} | self._origin).items():
                if entry.get(field) != ours:
                    raise UserError(
                        f"{file}: steps for {name}: expected {field} {ours!r}, got {entry.get(field)!r}; {what_to_do}"
                    )
        return {name: entry["steps"] for name, entry in found.items()}

    def _take(self, given: Sequence[str] | Mapping[str, Sequence[str]]) -> None:
        """Steps of the user."""
        if self._file is not None:
            raise UserError(
                "geval.steps_file: not with geval.evaluation_steps, which are in the configuration already; drop one"
            )
        if not isinstance(given, Mapping):
            if isinstance(given, str) or len(self._criteria) != 1:
                raise UserError(
                    f"geval.evaluation_steps: expected criterion → list of steps, or a list for one criterion, got {given!r}"
                )
            given = {next(iter(self._criteria)): given}
        steps = {name: [str(step).strip() for step in listed] for name, listed in given.items()}
        if set(steps) != set(self._criteria) or not all(listed and all(listed) for listed in steps.values()):
            raise UserError(
                f"geval.evaluation_steps: expected steps for each of {', '.join(self._criteria)}, got {dict(steps)}"
            )
        self.found = steps


def parse_steps(text: str) -> list[str]:
    r"""The lines of a numbered or bulleted list.

    >>> parse_steps("Here you are:\n1. Read it.\n2) Rate it.")
    ['Read it.', 'Rate it.']
    """
    return [found[1].strip() for line in text.splitlines() if (found := _STEP.fullmatch(line))]


def _is_list_of_text(steps: object) -> bool:
    return isinstance(steps, list) and bool(steps) and all(isinstance(step, str) and step for step in steps)
