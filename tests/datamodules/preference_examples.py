"""The example files of docs/data.md, each with the options and the result that stand beside it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.preference_file import PreferenceFile
from datamodules.records import LoadReport, PreferencePair
from tests.processes import ROOT

DOC = ROOT / "docs" / "data.md"
_EXAMPLE = re.compile(
    r"^[^\n`]*`?[^\n]*?`(\w+\.\w+)`([^\n]*):\n\n```\w+\n(.*?)```\n```diff\n(.*?)```", re.DOTALL | re.MULTILINE
)


class Example(NamedTuple):
    name: str
    options: dict[str, Any]
    text: str
    result: str

    def write(self, folder: Path) -> Path:
        path = folder / self.name
        path.write_text(self.text, encoding="utf-8")
        return path


def _examples() -> dict[str, Example]:
    found = {}
    for name, said, text, result in _EXAMPLE.findall(DOC.read_text(encoding="utf-8")):
        columns = dict(re.findall(r"data\.columns\.(\w+)=(\w+)", said))
        margin = re.search(r"data\.min_margin=(\d+)", said)
        options: dict[str, Any] = {"columns": columns} if columns else {}
        if margin:
            options["min_margin"] = float(margin[1])
        found[name] = Example(name, options, text, result.strip())
    return found


EXAMPLES = _examples()


def shown(pairs: Sequence[PreferencePair], reports: Sequence[LoadReport]) -> str:
    """Pairs and what was left out, in the words of the document."""
    blocks = []
    for pair in pairs:
        lines = [f"{turn.role}: {turn.content}" for turn in pair.prompt]
        lines += [f"+ {pair.chosen.content}", f"- {pair.rejected.content}"]
        if pair.attributes:
            lines.append(", ".join(f"{name} {value}" for name, value in pair.attributes.items()))
        blocks.append("\n".join(lines))
    if dropped := ", ".join(f"{n} {reason}" for report in reports for reason, n in report.dropped.items()):
        blocks.append(f"left out: {dropped}")
    return "\n\n".join(blocks)


def load(path: Path | Sequence[Path], **options: Any) -> tuple[list[PreferencePair], list[LoadReport]]:
    """What a source of this path yields."""
    paths: Any = str(path) if isinstance(path, Path) else [str(p) for p in path]
    return PreferenceFile(paths, **options).load()
