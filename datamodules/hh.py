r"""The Anthropic HH source: pairs of whole transcripts, split at the right-most ``\n\nAssistant:`` into prompt and two responses.

Source: Bai et al. 2022, "Training a Helpful and Harmless Assistant with RLHF"; data set ``Anthropic/hh-rlhf``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.files.jsonl import EXPECTED, files_named, hub_file, hub_location, list_files, read_rows, stem
from datamodules.files.malformed import Malformed, MalformedRows, check_policy
from datamodules.records import LoadReport, Message, PreferencePair, Role
from tiltmeter.errors import UserError
from tiltmeter.plain_text import did_you_mean

REPO = "Anthropic/hh-rlhf"
HUB_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
PAPER_SUBSETS = ("harmless-base", "helpful-base")
SPLITS = ("train", "test")

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ANSWER = "\n\nAssistant:"
_INLINE = re.compile(r"(?<=\s)(?:Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class _File:
    path: Path
    subset: str
    location: str


class AnthropicHH:
    """Anthropic HH from local files or from the Hugging Face hub.

    Args:
        path: A ``.jsonl`` / ``.jsonl.gz`` file, a folder of them, or a copy of the data set's repository
            (``harmless-base/train.jsonl.gz`` …). None reads from the hub.
        subsets: Which subsets. On the hub and in a copy of it: names of folders, by default harmless-base and
            helpful-base. For plain files: the files whose name contains one of these, by default all of them.
        split: ``train`` or ``test``. On the hub and in a copy of it the name of the file, by default ``train``. For
            plain files: the files whose name contains it, by default all of them.
        revision: Branch, tag or commit on the hub; only without ``path``.
        malformed: What to do with rows that aren't what is expected: ``strict`` refuses the first, ``skip`` leaves up to
            1 % of a file out and says so.

    Raises:
        UserError: An unknown subset, split or policy, ``revision`` together with ``path``.
    """

    name = "hh"

    def __init__(
        self,
        path: str | None = None,
        subsets: Sequence[str] | None = None,
        split: str | None = None,
        revision: str | None = None,
        malformed: Malformed = "strict",
    ) -> None:
        check_policy(malformed)
        if isinstance(subsets, str) or (subsets is not None and not list(subsets)):
            raise UserError(f"data.subsets: expected a list of names such as [harmless-base], got {subsets!r}")
        if split is not None and split not in SPLITS:
            raise UserError(f"data.split: expected train or test, got {split!r}")
        if path is not None and revision is not None:
            raise UserError("data.revision: only for data from the hub; leave it out together with data.path")
        self.path = path
        self.subsets = None if subsets is None else tuple(dict.fromkeys(subsets))
        self.split = split
        self.revision = revision
        self.malformed: Malformed = malformed
        if path is None:
            self._hub_names()

    def load(self) -> tuple[list[PreferencePair], list[LoadReport]]:
        """All usable pairs in file order, one report per file.

        Raises:
            UserError: Missing or malformed files, rows with other keys, or no pair left in any of the files.
        """
        files, not_read = self._files()
        pairs: list[PreferencePair] = []
        reports: list[LoadReport] = []
        for file in files:
            kept, report = _load_file(file, self.malformed)
            pairs += kept
            reports.append(report)
        if not pairs:
            reasons = ", ".join(f"{n} {reason}" for r in reports for reason, n in r.dropped.most_common())
            raise UserError(f"data.path: no usable pair in {len(files)} file(s) of {self.path or REPO}: {reasons}")
        if not_read:
            reports[0].notes["not read"] = ", ".join(not_read)
        return pairs, reports

    def _files(self) -> tuple[list[_File], list[str]]:
        """The files to read, and the names of files that lie beside them and are left out."""
        if self.path is None:
            return [self._from_hub(subset) for subset in self._hub_names()], []
        root = Path(self.path).expanduser()
        if any((root / subset).is_dir() for subset in HUB_SUBSETS):
            return [self._from_copy(root, subset) for subset in self._hub_names()], []
        return self._from_folder(root)

    def _from_folder(self, root: Path) -> tuple[list[_File], list[str]]:
        found = list_files(root)
        chosen = files_named(found, self.split, "data.split", root)
        if self.subsets is not None:
            wanted = {f for subset in self.subsets for f in files_named(chosen, subset, "data.subsets", root)}
            chosen = [f for f in chosen if f in wanted]
        return [_File(f, stem(f), str(f)) for f in chosen], [f.name for f in found if f not in chosen]

    def _hub_names(self) -> tuple[str, ...]:
        names = PAPER_SUBSETS if self.subsets is None else self.subsets
        for subset in names:
            if subset not in HUB_SUBSETS:
                known = ", ".join(HUB_SUBSETS)
                raise UserError(
                    f"data.subsets: unknown subset {subset!r} (expected {known}){did_you_mean(subset, HUB_SUBSETS, cutoff=0.4)}"
                )
        return names

    def _from_hub(self, subset: str) -> _File:
        split = self.split or "train"
        path = hub_file(REPO, f"{subset}/{split}.jsonl.gz", self.revision, "data.path")
        return _File(path, f"{subset}_{split}", f"{hub_location(REPO, path, self.revision)}/{subset}/{split}.jsonl.gz")

    def _from_copy(self, root: Path, subset: str) -> _File:
        split = self.split or "train"
        for suffix in (".jsonl.gz", ".jsonl"):
            path = root / subset / f"{split}{suffix}"
            if path.is_file():
                return _File(path, f"{subset}_{split}", str(path))
        raise UserError(f"data.path: no such file: {root / subset / split}.jsonl.gz ({EXPECTED})")


def parse_row(chosen: str, rejected: str) -> tuple[tuple[Message, ...], str, str, str] | str:
    r"""One HH row as (prompt messages, prompt text, chosen text, rejected text), or the reason to drop it.

    The prompt text ends with the right-most ``\n\nAssistant:``; the three texts are exact, messages are stripped.

    >>> parse_row("\n\nHuman: Hi\n\nAssistant: Hello.", "\n\nHuman: Hi\n\nAssistant: Go away.")[1:]
    ('\n\nHuman: Hi\n\nAssistant:', ' Hello.', ' Go away.')
    >>> parse_row("\n\nHuman: Hi\n\nAssistant: Hello.", "\n\nHuman: Hi\n\nAssistant: Hello.")
    'identical responses'
    """
    if chosen == rejected:
        return "identical responses"
    for side in (chosen, rejected):
        turns = _TURN.findall(side)
        if not turns or turns[-1] != "Assistant":
            return "last turn is not the assistant's"
    split_at = chosen.rfind(_ANSWER) + len(_ANSWER)
    prompt_text, chosen_text = chosen[:split_at], chosen[split_at:]
    if rejected[: rejected.rfind(_ANSWER) + len(_ANSWER)] != prompt_text:
        return "prompts differ"
    rejected_text = rejected[split_at:]
    if not chosen_text.strip() or not rejected_text.strip():
        return "empty response"
    if chosen_text.strip() == rejected_text.strip():
        return "identical responses"
    messages = _prompt_messages(prompt_text)
    return messages if isinstance(messages, str) else (messages, prompt_text, chosen_text, rejected_text)


def _prompt_messages(prompt_text: str) -> tuple[Message, ...] | str:
    """Turns of a prompt that ends where the assistant is to speak, or the reason to drop it."""
    before, *parts = _TURN.split(prompt_text)
    roles, contents = parts[0::2], [text.strip() for text in parts[1::2]]
    if before.strip():
        return "text before the first turn"
    if any(role != ("Human", "Assistant")[i % 2] for i, role in enumerate(roles)):
        return "turns do not alternate"
    if not all(contents[:-1]):
        return "empty turn in the prompt"
    return tuple(Message(_ROLES[role], text) for role, text in zip(roles[:-1], contents[:-1], strict=True))


def _load_file(file: _File, policy: Malformed) -> tuple[list[PreferencePair], LoadReport]:
    source = f"hh/{file.subset}"
    report = LoadReport(source=source, location=file.location)
    pairs: list[PreferencePair] = []
    malformed = MalformedRows(policy)
    n_inline = 0
    for line_number, row in read_rows(file.path, malformed):
        try:
            _check_row(row, f"{file.path}:{line_number}")
        except UserError as error:
            malformed(error)
            continue
        report.n_rows += 1
        parsed = parse_row(row["chosen"], row["rejected"])
        if isinstance(parsed, str):
            report.dropped[parsed] += 1
            continue
        messages, prompt_text, chosen_text, rejected_text = parsed
        contents = [m.content for m in messages] + [chosen_text, rejected_text]
        n_inline += any(_INLINE.search(text) for text in contents)
        pairs.append(
            PreferencePair(
                pair_id=f"{source}/{line_number - 1:05d}",  # the row's position in the file, from zero
                source=source,
                group=" ".join(messages[0].content.lower().split()),
                prompt=messages,
                chosen=Message("assistant", chosen_text.strip()),
                rejected=Message("assistant", rejected_text.strip()),
                prompt_text=prompt_text,
                chosen_text=chosen_text,
                rejected_text=rejected_text,
            )
        )
    report.n_kept = len(pairs)
    malformed.settle(report, report.n_rows)
    if n_inline:
        report.notes["kept as they are"] = f"{n_inline} rows with a 'Human:' or 'Assistant:' inside a turn"
    return pairs, report


def _check_row(row: dict[str, Any], where: str) -> None:
    if set(row) != {"chosen", "rejected"}:
        raise UserError(f"{where}: expected the keys chosen and rejected, got {', '.join(sorted(row)) or 'none'}")
    for key, value in row.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: {key}: expected a string, got {type(value).__name__} {str(value)[:40]!r}")
