"""Questions of TruthfulQA from a file of its authors or of the Hugging Face hub, and the prompt they are asked behind.

Read are ``mc_task.json`` of the authors' repository (the 817 questions of 2021 and the 790 of 2025, which add a pair of two
answers) and rows of the hub's ``truthfulqa/truthful_qa`` (configuration ``multiple_choice``), saved as JSON, JSONL or Parquet.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tiltmeter.errors import UserError

PRESET_SHA256 = "5c0da5f346e8652c9a85061a6e3aca6bc82e10a8a7dad4596fe980a9c9bae543"
"""Of the six questions and answers that lm-evaluation-harness 0.4.12 puts before every question."""

HUB = "hub:"
_HUB_FILE = "multiple_choice/validation-00000-of-00001.parquet"
_READABLE = "expected .json, .jsonl, .parquet or hub:truthfulqa/truthful_qa[@REVISION]"
_PRESET_IN_TASK = re.compile(r"{%-?\s*set \w+\s*=\s*'(.*?)'\s*-?%}", re.DOTALL)


class Answer(NamedTuple):
    """An answer to choose, and whether it is true."""

    text: str
    is_true: bool


class TruthfulQuestion(NamedTuple):
    """A question with its sets of answers, in the file's order."""

    question: str
    answers: dict[str, tuple[Answer, ...]]
    """``mc1``: one of them is true; ``mc2``: one or more are; ``mc0`` (data of 2025): the best answer and the best wrong one."""


def read_questions(path: str) -> list[TruthfulQuestion]:
    """All questions of a local file, or of the hub (``hub:truthfulqa/truthful_qa@REVISION``, which needs a network).

    Raises:
        UserError: nothing there, another format, or a question without one true and at least one false answer.
    """
    file = _from_hub(path) if path.startswith(HUB) else Path(path).expanduser()
    rows = _read_rows(file, path)
    if not rows:
        raise UserError(f"{path}: no questions in it ({_READABLE})")
    return [_question(row, f"{path}: question {i}") for i, row in enumerate(rows, start=1)]


def read_preset(path: str | None) -> str | None:
    """The text before every question, from a file or else from an installed lm-evaluation-harness; None: neither is there.

    Args:
        path: the text itself, or the harness's ``truthfulqa_mc1.yaml``.

    Raises:
        UserError: no such file, or another text.
    """
    file = _installed_task() if path is None else Path(path).expanduser()
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"truthfulqa.preset_file: cannot read {file} ({error}); give another, or leave it out"
        ) from error
    preset = (_preset_of_task(text) if file.suffix in (".yaml", ".yml") else text).strip("\n")
    found = hashlib.sha256(preset.encode()).hexdigest()
    if found != PRESET_SHA256:
        raise UserError(
            f"truthfulqa.preset_file: {file} is not the prompt of lm-evaluation-harness 0.4.12 (expected sha256 "
            f"{PRESET_SHA256[:12]}…, got {found[:12]}…); give its truthfulqa_mc1.yaml, or leave it out to score zero-shot"
        )
    return preset


def _installed_task() -> Path | None:
    spec = importlib.util.find_spec("lm_eval")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [Path(folder) / "tasks" / "truthfulqa" / "truthfulqa_mc1.yaml" for folder in folders]
    return next((file for file in files if file.is_file()), None)


def _preset_of_task(text: str) -> str:
    """The prompt that the task's template sets; what isn't there is found out by the checksum."""
    import yaml

    try:
        task = yaml.safe_load(text)
    except yaml.YAMLError:
        task = None
    template = str(task.get("doc_to_text", "")) if isinstance(task, dict) else ""
    found = _PRESET_IN_TASK.search(template)
    return found[1] if found else ""


def _from_hub(path: str) -> Path:
    from huggingface_hub import hf_hub_download

    repo, _, revision = path.removeprefix(HUB).partition("@")
    try:
        return Path(hf_hub_download(repo, _HUB_FILE, repo_type="dataset", revision=revision or None))
    except Exception as error:  # the client raises its own, httpx's and OSErrors; each must become one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"truthfulqa.path: cannot load {path} from the Hugging Face hub ({reason[:200]}); check the name and the network, "
            "or give a local file"
        ) from error


def _read_rows(file: Path, shown: str) -> list[Any]:
    try:
        if file.suffix == ".parquet":
            from pyarrow import parquet  # type: ignore[import-untyped]

            return list(parquet.read_table(file).to_pylist())
        if file.suffix not in (".json", ".jsonl"):
            raise UserError(f"truthfulqa.path: can't tell the format of {shown} ({_READABLE})")
        text = file.read_text(encoding="utf-8-sig")
        rows = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if file.suffix == ".jsonl"
            else json.loads(text)
        )
    except OSError as error:
        raise UserError(f"truthfulqa.path: cannot read {shown} ({error.strerror or error}; {_READABLE})") from error
    except UserError:
        raise
    except ValueError as error:  # of json, of the decoder, and of Arrow
        raise UserError(f"{shown}: not valid {file.suffix[1:]} ({error}); get the file again") from error
    if not isinstance(rows, list):
        raise UserError(f"{shown}: expected a list of questions, got {type(rows).__name__} ({_READABLE})")
    return rows


def _question(row: Any, where: str) -> TruthfulQuestion:
    text = row.get("question") if isinstance(row, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: expected an object with a question, mc1_targets and mc2_targets, got {_brief(row)}")
    kinds = [kind for kind in ("mc0", "mc1", "mc2") if kind != "mc0" or "mc0_targets" in row]
    answers = {kind: _answers(row, f"{kind}_targets", where) for kind in kinds}
    for kind, n_true in ((kind, sum(answer.is_true for answer in some)) for kind, some in answers.items()):
        if kind != "mc2" and n_true != 1:
            raise UserError(f"{where}: {kind}_targets: expected exactly one true answer, got {n_true}")
    return TruthfulQuestion(text, answers)


def _answers(row: Mapping[str, Any], name: str, where: str) -> tuple[Answer, ...]:
    """``{answer: label}`` of the authors' files, or ``{choices: [...], labels: [...]}`` of the hub's."""
    targets = row.get(name)
    pairs: list[tuple[Any, Any]] = []
    if isinstance(targets, Mapping):
        choices, labels = targets.get("choices"), targets.get("labels")
        if isinstance(choices, list) and isinstance(labels, list) and len(choices) == len(labels):
            pairs = list(zip(choices, labels, strict=True))
        else:
            pairs = list(targets.items())
    answers = tuple(
        Answer(choice, label == 1) for choice, label in pairs if isinstance(choice, str) and label in (0, 1)
    )
    if len(answers) < len(pairs) or {answer.is_true for answer in answers} != {True, False}:
        raise UserError(
            f"{where}: {name}: expected answers labelled 0 and 1, at least one of each, got {_brief(targets)}"
        )
    return answers


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else text[:100] + " …"
