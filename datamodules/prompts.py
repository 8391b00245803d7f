"""Prompts without preferences, for scoring what models make of them: RealToxicityPrompts, or one prompt a row of a table."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from datamodules.files.preference_forms import prompt_messages
from datamodules.files.tables import Table, local_tables
from datamodules.records import AttributeValue, transcript
from tiltmeter.errors import UserError
from tiltmeter.scoring.toxicity import PROMPT_TOXICITY

_COLUMNS = ("prompt", "text", "messages", "conversations")


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
    """Prompts of a JSON Lines, JSON, CSV, TSV or Parquet file or a folder of them.

    Rows are those of RealToxicityPrompts, ``{"prompt": {"text": …, "toxicity": …}, …}``, ``{"prompt": …}``, ``{"text": …}``, or
    messages that end with a user's, ``{"messages": [{"role": …, "content": …}, …]}`` or under ``prompt``, which become a
    Human/Assistant transcript. Texts, numbers and truth values that stand beside the prompt become attributes;
    ``prompt_toxicity`` among them counts as the prompt's toxicity.

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
        for table in local_tables([self.path], None, self.key)[0]:
            for number, row in table.rows(_refuse):
                if self.max_prompts is not None and len(prompts) >= self.max_prompts:
                    return prompts
                prompts.append(_parse(row, table, number))
        return prompts


def _refuse(error: UserError) -> None:
    raise error


def _parse(row: Mapping[str, Any], table: Table, number: int) -> Prompt:
    where = f"{table.location}:{number}"
    column = next((name for name in _COLUMNS if row.get(name) is not None), "prompt")
    given = row.get(column)
    fields = given if isinstance(given, dict) and "role" not in given else {"text": given}
    text = fields.get("text")
    if isinstance(text, list | dict):
        text = transcript(prompt_messages(text, where), "")[0]
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f'{where}: expected {{"prompt": TEXT}}, {{"text": TEXT}}, {{"messages": […]}} or {{"prompt": {{"text": TEXT, …}}}} '
            f"with some text, got {given!r:.60}"
        )
    plain = str | int | float | bool
    attributes: dict[str, AttributeValue] = {
        key: value for key, value in row.items() if isinstance(value, plain) and key != column
    }
    toxicity = fields.get("toxicity", row.get(PROMPT_TOXICITY))
    if toxicity is not None:  # the service that scored RealToxicityPrompts left some out
        attributes[PROMPT_TOXICITY] = _share(toxicity, where)
    return Prompt(f"{table.name}/{number - 1:05d}", text, attributes)


def _share(toxicity: Any, where: str) -> float:
    if isinstance(toxicity, str):  # a cell of a CSV file
        with suppress(ValueError):
            toxicity = float(toxicity)
    if isinstance(toxicity, bool) or not isinstance(toxicity, int | float) or not 0 <= toxicity <= 1:
        raise UserError(f"{where}: prompt.toxicity: expected a number from 0 to 1, or null, got {toxicity!r:.60}")
    return float(toxicity)
