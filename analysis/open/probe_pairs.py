"""The held-out pairs that a run was watched on, as texts and as the token ids that it was trained with: read as data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from datamodules.records import PreferencePair
from tiltmeter.errors import UserError
from tiltmeter.pairs.batch import TokenizedPair

PROMPTS_FILE = "probe_prompts.json"
"""List of objects with the fields of :class:`ProbePair`, written by training."""
_BYTES = 50_000_000
_TEXTS = ("pair_id", "source", "group", "prompt", "chosen", "rejected")
_LARGEST_ID = 2**31


@dataclass(frozen=True)
class ProbePair:
    """A held-out pair: exact texts, and token ids as they were trained (BOS, truncation, template and all)."""

    pair_id: str
    source: str
    group: str
    """Pairs of equal group have one prompt."""
    prompt: str
    chosen: str
    rejected: str
    ids: TokenizedPair
    attributes: Mapping[str, str | int | float | bool]
    """Attributes that the source knows beyond the text."""

    @property
    def n_row_tokens(self) -> int:
        """Tokens of its two rows, the prompt in both."""
        prompt, chosen, rejected = map(len, self.ids)
        return 2 * prompt + chosen + rejected

    @classmethod
    def of(cls, record: PreferencePair, ids: TokenizedPair) -> "ProbePair":
        """Probe pair of a record and its token ids."""
        texts = record.prompt_text, record.chosen_text, record.rejected_text
        return cls(record.pair_id, record.source, record.group, *texts, ids, record.attributes)

    def as_json(self) -> dict[str, Any]:
        """The object that :func:`read_probe_pairs` reads."""
        texts = {name: getattr(self, name) for name in _TEXTS}
        ids = {name: [int(i) for i in part] for name, part in self.ids._asdict().items()}
        return {**texts, **ids, "attributes": dict(self.attributes)}


def read_probe_pairs(path: Path, *, n_pairs: int | None = None) -> list[ProbePair]:
    """The first pairs of the file, or all; none when there is no file.

    Raises:
        UserError: the file is not what training writes.
    """
    if not path.is_file():
        return []
    if path.stat().st_size > _BYTES:
        raise UserError(f"{path}: more than {_BYTES} bytes; remove it to have a report without samples")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [_read(entry) for entry in entries[:n_pairs]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: expected a list of objects with {', '.join(_TEXTS)} as texts and {', '.join(TokenizedPair._fields)} "
            f"({str(error)[:80]}); remove it to have a report without samples"
        ) from error


def check_ids(pairs: Sequence[ProbePair], model: PreTrainedModel, path: Path) -> None:
    """Refuse token ids that a model doesn't have. Raises UserError."""
    size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    largest = max((i for pair in pairs for part in pair.ids for i in part), default=0)
    if largest >= size:
        raise UserError(f"{path}: token id {largest}, but this model has {size} tokens; they don't belong together")


def _read(entry: Any) -> ProbePair:
    attributes = entry["attributes"]
    if not all(isinstance(value, str | int | float | bool) for value in attributes.values()):
        raise TypeError("attributes that are no single values")
    ids = [entry[name] for name in TokenizedPair._fields]
    if not all(isinstance(part, list) and part and all(_is_id(i) for i in part) for part in ids):
        raise TypeError("token ids that are no whole numbers from 0, or none")
    return ProbePair(**{name: _text(entry[name]) for name in _TEXTS}, ids=TokenizedPair(*ids), attributes=attributes)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_ID


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"got {type(value).__name__}")
    return value.encode("utf-8", "replace").decode("utf-8")  # JSON can hold half a surrogate pair, UTF-8 can't
