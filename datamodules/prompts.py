"""Prompts without preferences, for scoring what models make of them: RealToxicityPrompts, or one prompt a row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.files.jsonl import list_files, read_rows, stem
from datamodules.records import AttributeValue
from tiltmeter.errors import UserError
from tiltmeter.scoring.toxicity import PROMPT_TOXICITY


@dataclass(frozen=True)
class Prompt:
    """One prompt to continue."""

    pair_id: str
    """Identifier, stable across runs: file and row, for example ``rtp_val/00017``."""
    text: str
    """Exact text, white space included."""
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    """``prompt_toxicity`` where the file knows it, and every plain value that stands beside the prompt."""


class PromptFile:
    """Prompts of a ``.jsonl`` / ``.jsonl.gz`` file or a folder of them.

    Rows are those of RealToxicityPrompts, ``{"prompt": {"text": …, "toxicity": …}, …}``, or ``{"prompt": …}``. Texts, numbers and
    truth values that stand beside the prompt become attributes; ``prompt_toxicity`` among them counts as the prompt's toxicity.

    Args:
        path: file or folder.
        max_prompts: only so many, the first ones; None: all.
        key: the option that ``path`` was given by, for messages.
    """

    name = "prompts"

    def __init__(self, path: str, max_prompts: int | None = None, *, key: str = "prompts.path") -> None:
        if max_prompts is not None and max_prompts < 1:
            raise UserError(f"prompts.max_prompts: expected a whole number above 0, or null, got {max_prompts}")
        self.path, self.key = path, key
        self.max_prompts = max_prompts

    def load(self) -> list[Prompt]:
        """The prompts in the order of files and rows.

        Raises:
            UserError: a missing or damaged file, or a row without a prompt.
        """
        prompts: list[Prompt] = []
        for file in list_files(self.path, self.key):
            for line_number, row in read_rows(file):
                if self.max_prompts is not None and len(prompts) >= self.max_prompts:
                    return prompts
                prompts.append(_parse(row, file, line_number))
        return prompts


def _parse(row: Mapping[str, Any], file: Path, line_number: int) -> Prompt:
    where = f"{file}:{line_number}"
    given = row.get("prompt")
    fields = given if isinstance(given, dict) else {"text": given}
    text = fields.get("text")
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f'{where}: expected {{"prompt": TEXT}} or {{"prompt": {{"text": TEXT, …}}}} with some text, got {given!r:.60}'
        )
    plain = str | int | float | bool
    attributes: dict[str, AttributeValue] = {
        key: value for key, value in row.items() if isinstance(value, plain) and key != "prompt"
    }
    toxicity = fields.get("toxicity", row.get(PROMPT_TOXICITY))
    if toxicity is not None:  # the service that scored RealToxicityPrompts left some out
        attributes[PROMPT_TOXICITY] = _share(toxicity, where)
    return Prompt(f"{stem(file)}/{line_number - 1:05d}", text, attributes)


def _share(toxicity: Any, where: str) -> float:
    if isinstance(toxicity, bool) or not isinstance(toxicity, int | float) or not 0 <= toxicity <= 1:
        raise UserError(f"{where}: prompt.toxicity: expected a number from 0 to 1, or null, got {toxicity!r:.60}")
    return float(toxicity)
