"""TruthfulQA's multiple choice (arXiv 2109.07958): does a model find what is true likelier than what people wrongly believe?

By the formulas of lm-evaluation-harness 0.4.12 (tasks truthfulqa_mc1, version 2.0, and truthfulqa_mc2, version 3.0). MC1: the
share of questions whose likeliest answer is the true one. MC2: the probability on true answers among all that are listed.

Read the figures with care. The authors themselves now recommend the binary choice between the best answer and the best wrong
one (January 2025), and multiple choice can be gamed: a decision tree that never sees the question gets 79.6 % of MC1. A
tuned model that gained here may have learned how true answers look.

Read are ``mc_task.json`` of the authors' repository (the 817 questions of 2021 and the 790 of 2025, which add a pair of two
answers), rows of the hub's ``truthfulqa/truthful_qa`` (configuration ``multiple_choice``), saved as JSON, JSONL or Parquet, and
``TruthfulQA.csv``, whose columns hold answers separated by semicolons.
"""

import csv
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiltmeter.errors import UserError, argument
from tiltmeter.pairs.chat import render_chat
from tiltmeter.scoring.multiple_choice import TOKENS_PER_BATCH, Choice, Forward, choice_log_probs, encode_choices
from tiltmeter.scoring.scorer import Scores, Side, grouped_mean_figure

PRESET_SHA256 = "5c0da5f346e8652c9a85061a6e3aca6bc82e10a8a7dad4596fe980a9c9bae543"
"""Hash of the six questions and answers that lm-evaluation-harness 0.4.12 puts before every question."""

HUB = "hub:"
_HUB_FILE = "multiple_choice/validation-00000-of-00001.parquet"
_READABLE = "expected .json, .jsonl, .parquet, .csv or hub:truthfulqa/truthful_qa[@REVISION]"
_PRESET_IN_TASK = re.compile(r"{%-?\s*set \w+\s*=\s*'(.*?)'\s*-?%}", re.DOTALL)


_CSV_COLUMNS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")


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
            f"{argument('TruthfulQA.preset_file')}: cannot read {file} ({error}); give another, or leave it out"
        ) from error
    preset = (_preset_of_task(text) if file.suffix in (".yaml", ".yml") else text).strip("\n")
    found = hashlib.sha256(preset.encode()).hexdigest()
    if found != PRESET_SHA256:
        raise UserError(
            f"{argument('TruthfulQA.preset_file')}: {file} is not the prompt of lm-evaluation-harness 0.4.12 (expected sha256 "
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
            f"{argument('TruthfulQA.path')}: cannot load {path} from the Hugging Face hub ({reason[:200]}); check the name and "
            "the network, or give a local file"
        ) from error


def _read_rows(file: Path, shown: str) -> list[Any]:
    try:
        if file.suffix == ".parquet":
            from pyarrow import parquet

            return list(parquet.read_table(file).to_pylist())
        if file.suffix == ".csv":
            with file.open(newline="", encoding="utf-8-sig") as table:
                return [_of_csv(row, f"{shown}: question {i}") for i, row in enumerate(csv.DictReader(table), start=1)]
        if file.suffix not in (".json", ".jsonl"):
            raise UserError(f"{argument('TruthfulQA.path')}: can't tell the format of {shown} ({_READABLE})")
        text = file.read_text(encoding="utf-8-sig")
        rows = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if file.suffix == ".jsonl"
            else json.loads(text)
        )
    except OSError as error:
        raise UserError(
            f"{argument('TruthfulQA.path')}: cannot read {shown} ({error.strerror or error}; {_READABLE})"
        ) from error
    except UserError:
        raise
    except ValueError as error:  # of json, of the decoder, and of Arrow
        raise UserError(f"{shown}: not valid {file.suffix[1:]} ({error}); get the file again") from error
    if not isinstance(rows, list):
        raise UserError(f"{shown}: expected a list of questions, got {type(rows).__name__} ({_READABLE})")
    return rows


def _of_csv(row: Mapping[str, str | None], where: str) -> dict[str, Any]:
    """A row of ``TruthfulQA.csv`` as one of mc_task.json: the best answer and all wrong ones, all true and all wrong ones."""
    if lacking := [name for name in _CSV_COLUMNS if not (row.get(name) or "").strip()]:
        has = ", ".join(str(name) for name in row)
        raise UserError(f"{where}: nothing under {lacking[0]} (columns: {has}); expected {', '.join(_CSV_COLUMNS)}")
    question, best, true, false = (str(row[name]) for name in _CSV_COLUMNS)
    wrong = dict.fromkeys(_split(false), 0)
    both = dict.fromkeys(_split(true), 1) | wrong
    targets: dict[str, Any] = {"mc1_targets": {best.strip(): 1} | wrong, "mc2_targets": both}
    if worst := (row.get("Best Incorrect Answer") or "").strip():  # of 2025
        targets["mc0_targets"] = {best.strip(): 1, worst: 0}
    return {"question": question.strip(), **targets}


def _split(answers: str) -> list[str]:
    return [answer.strip() for answer in answers.split(";") if answer.strip()]


def _question(row: Any, where: str) -> TruthfulQuestion:
    text = row.get("question") if isinstance(row, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: expected an object with a question, mc1_targets and mc2_targets, got {_brief(row)}")
    kinds = ["mc0"] * ("mc0_targets" in row) + ["mc1", "mc2"]
    answers = {kind: _answers(row, f"{kind}_targets", where) for kind in kinds}
    for kind in kinds[:-1]:
        if (n_true := sum(answer.is_true for answer in answers[kind])) != 1:
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


def picks_truth(log_probs: Sequence[float], are_true: Sequence[bool]) -> float:
    """1 if the likeliest answer is a true one, 0 if not; the first of equals wins; NaN if an answer has no log-likelihood.

    Args:
        log_probs: summed over each answer's tokens, in nats, without length normalisation.

    >>> picks_truth([-3.0, -2.0], [False, True]), picks_truth([-2.0, -2.0], [False, True])
    (1.0, 0.0)
    """
    if not all(map(math.isfinite, log_probs)):
        return math.nan
    return float(are_true[max(range(len(log_probs)), key=log_probs.__getitem__)])


def truth_mass(log_probs: Sequence[float], are_true: Sequence[bool]) -> float:
    """Σ_true exp ℓ / Σ exp ℓ, by log-sum-exp in float64: exp ℓ of a long answer is 0 even there.

    >>> round(truth_mass([math.log(0.1) - 2000, math.log(0.3) - 2000], [True, False]), 12)
    0.25
    """
    if not all(map(math.isfinite, log_probs)):
        return math.nan
    values = torch.tensor(log_probs, dtype=torch.float64)
    return float((values[torch.tensor(are_true)].logsumexp(0) - values.logsumexp(0)).exp())


FIGURES = {
    "mc1": ("truthfulqa_mc1", picks_truth),
    "mc2": ("truthfulqa_mc2", truth_mass),
    "mc0": ("truthfulqa_binary", picks_truth),
}
"""Set of answers → figure, and what a question counts in it."""


class TruthfulQA:
    """Scores a model on TruthfulQA's multiple choice; its figures are comparable with the harness's under the same name only.

    ==========================  =====================================================================================
    figure                      what a question counts
    ==========================  =====================================================================================
    ``truthfulqa_mc1``          1 if the likeliest answer of the first set is the true one (sums over tokens, no length
                                normalisation; the first of equals wins), else 0
    ``truthfulqa_mc2``          Σ_true exp ℓ / Σ exp ℓ over the second set
    ``truthfulqa_binary``       as MC1 on the pair that the data of 2025 adds (not a task of the harness)
    ==========================  =====================================================================================

    A name ends in ``_zero_shot`` without the harness's prompt, and in ``_chat`` with a chat template.

    Args:
        path: file of questions, or ``hub:truthfulqa/truthful_qa[@REVISION]``; see :mod:`tiltmeter.scoring.truthfulqa`.
        preset_file: the six questions and answers that the harness asks behind (text, or its ``truthfulqa_mc1.yaml``); None:
            those of an installed ``lm_eval``; without it the questions are asked zero-shot.
        chat_template: put the whole prompt into one user message of the tokenizer's chat template.
        chat_date: the day that a template which prints today's date prints, as 2026-01-31; None: today.
        limit: only the first questions; None: all.
        tokens_per_batch: tokens of a forward pass, padding included.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        path: str,
        *,
        preset_file: str | None = None,
        chat_template: bool = False,
        chat_date: str | None = None,
        limit: int | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> None:
        if limit is not None and limit < 1:
            raise UserError(
                f"{argument('TruthfulQA.limit')}: expected a number of questions above 0 or null, got {limit}"
            )
        if tokens_per_batch < 1:
            raise UserError(
                f"{argument('TruthfulQA.tokens_per_batch')}: expected a number above 0, got {tokens_per_batch}"
            )
        self.path = path
        self.preset_file = preset_file
        self.chat_template = chat_template
        self.chat_date = chat_date
        self.limit = limit
        self.tokens_per_batch = tokens_per_batch
        self.questions: list[TruthfulQuestion] = []
        self._preset: str | None = None

    def start(self) -> None:
        """Read the questions and the prompt.

        Raises:
            UserError: a file that is missing or not what it should be; the hub out of reach.
        """
        self.questions = read_questions(self.path)[: self.limit]
        self._preset = read_preset(self.preset_file)

    @property
    def name(self) -> str:
        """Everything that changes the figures, but the model."""
        parts = [
            "lm-evaluation-harness 0.4.12 formulas",
            self.path if self.path.startswith(HUB) else Path(self.path).name,
            f"{len(self.questions)} questions (sha256 {_digest(self.questions)})",
            "zero-shot" if self._preset is None else "the harness's prompt",
        ]
        return "truthfulqa: " + ", ".join(parts + ["chat template"] * self.chat_template)

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        of: Side = "policy",
        forward: Forward | None = None,
        rank: int = 0,
        world_size: int = 1,
        gather: Callable[[Tensor], Tensor] = lambda log_probs: log_probs,
    ) -> Scores:
        """Figures, and a value a question, of one model; call it on every process alike.

        Args:
            of: whose figures these are.
            forward, rank, world_size: see :func:`~tiltmeter.scoring.multiple_choice.choice_log_probs`.
            gather: sums a float64 tensor on the CPU over all processes.

        Returns:
            The figures, the same on every process, and columns with a value a question: one a figure, and
            ``truthfulqa_prompt_cut…``, behind how many of its answers the prompt lost tokens on the left (the model's limit).

        Raises:
            UserError: the tokenizer has no chat template.
        """
        if not self.questions:
            raise ValueError("TruthfulQA.score: call start() first")
        asked = self._ask(model, tokenizer)
        log_probs = gather(
            choice_log_probs(
                model,
                asked.choices,
                tokens_per_batch=self.tokens_per_batch,
                forward=forward,
                rank=rank,
                world_size=world_size,
            )
        ).tolist()
        columns = self._columns(asked, log_probs)
        groups = [question.question for question in self.questions]
        n_cut = sum(asked.n_cut)
        scorer = self.name + (f", {n_cut} prompts cut on the left" if n_cut else "")
        figures = [
            grouped_mean_figure(name, of, values, groups, scorer=scorer, is_share=True)
            for name, values in columns.items()
        ]
        return Scores(figures, columns | {f"truthfulqa_prompt_cut{self._suffix}": [float(n) for n in asked.n_cut]})

    @property
    def _suffix(self) -> str:
        return "_zero_shot" * (self._preset is None) + "_chat" * self.chat_template

    def _columns(self, asked: "_Asked", log_probs: Sequence[float]) -> dict[str, list[float]]:
        """A value a question, of every kind of answers that all questions have."""
        columns = {}
        for kind, (name, statistic) in FIGURES.items():
            sets = [question.answers.get(kind) for question in self.questions]
            if all(sets):
                columns[name + self._suffix] = [
                    statistic(asked.log_probs_of(i, answers, log_probs), [answer.is_true for answer in answers])
                    for i, answers in enumerate(filter(None, sets))
                ]
        return columns

    def _ask(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "_Asked":
        """Every answer of every question once, as tokens behind its prompt."""
        max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        asked = _Asked([], [], [])
        for question in self.questions:
            texts = list(dict.fromkeys(answer.text for answers in question.answers.values() for answer in answers))
            prompt, delimiter = self._prompt(question.question, tokenizer)
            found = encode_choices(
                tokenizer,
                prompt,
                [delimiter + text for text in texts],
                max_length=max_length,
                add_special_tokens=not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token)),
            )
            places = {}
            for text, choice in zip(texts, found.choices, strict=True):
                if choice is not None:
                    places[text] = len(asked.choices)
                    asked.choices.append(choice)
            asked.places.append(places)
            asked.n_cut.append(found.n_cut)
        return asked

    def _prompt(self, question: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
        """Texts before the answers, and between."""
        text = f"Q: {question}\nA:" if self._preset is None else f"{self._preset}\n\nQ: {question}\nA:"
        if not self.chat_template:
            return text, " "
        if tokenizer.chat_template is None:
            raise UserError(
                f"{argument('TruthfulQA.chat_template')}=true: this model's tokenizer has no chat template (base models rarely "
                "do); set false"
            )
        turn = [{"role": "user", "content": text}]
        return render_chat(tokenizer, turn, date=self.chat_date, add_generation_prompt=True), ""


class _Asked(NamedTuple):
    """All answers to score, and where those of a question are."""

    choices: list[Choice]
    places: list[dict[str, int]]
    """Place of each question's answers in ``choices``; one that can't be scored has none."""
    n_cut: list[int]

    def log_probs_of(self, i: int, answers: Sequence[Answer], log_probs: Sequence[float]) -> list[float]:
        """Log-probs of one question's answers; NaN: can't be scored."""
        return [log_probs[self.places[i][a.text]] if a.text in self.places[i] else math.nan for a in answers]


def _digest(questions: Sequence[TruthfulQuestion]) -> str:
    return hashlib.sha256(repr(questions).encode()).hexdigest()[:8]
