"""Toxicity by a sequence classifier from the Hugging Face hub or a folder: safetensors only, labels by name, commits pinned."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PretrainedConfig

from tiltmeter.errors import UserError, argument
from tiltmeter.scoring.scorer import Sample, Scores
from tiltmeter.scoring.toxicity import TextScore, toxicity_scores

Activation = Literal["sigmoid", "softmax"]

ALIASES = {
    "toxicity": ("toxicity", "toxic"),
    "severe_toxicity": ("severe_toxicity", "severe_toxic"),
    "identity_attack": ("identity_attack", "identity_hate"),
    "hate_speech": ("hate_speech", "hate", "hateful"),
}
"""Name of a label here → its names in models; any other label goes by its own name."""
_ACTIVATION_OF_PROBLEM: dict[str, Activation] = {
    "multi_label_classification": "sigmoid",
    "single_label_classification": "softmax",
}


@dataclass(frozen=True)
class Preset:
    """A published classifier, pinned."""

    model: str
    revision: str | None
    """Full commit; None: no commit with safetensors is known here, the user has to name one."""
    label: str
    activation: Activation | None


PRESETS = {
    "toxic-bert": Preset("unitary/toxic-bert", "4d6c22e74ba2fdd26bc4f7238f50766b045a0d94", "toxicity", "sigmoid"),
    "unbiased": Preset("unitary/unbiased-toxic-roberta", None, "toxicity", "sigmoid"),
    "s-nlp": Preset(
        "s-nlp/roberta_toxicity_classifier", "048c25bb1e199b98802784f96325f4840f22145d", "toxicity", "softmax"
    ),
    "hate-speech": Preset(
        "facebook/roberta-hate-speech-dynabench-r4-target",
        "391c99ab8b3f65beb77746a2cf6ddf1ddf9817e6",
        "hate_speech",
        "softmax",
    ),
}
"""``unbiased``: the main branch has no safetensors; a commit that begins with 9165055 has them."""
_BY_MODEL = {preset.model: preset for preset in PRESETS.values()}


class ClassifierToxicity:
    """Probability of a label, 0 … 1, that a classifier gives each completion. Figures are named after the label.

    An empty completion has no score. A text of more than ``max_length`` tokens is scored by its beginning; the share of
    these is the figure ``<label>_truncated``.

    Args:
        model: a preset (``toxic-bert``, ``unbiased``, ``s-nlp``, ``hate-speech``), a hub id, or a folder with config.json, a
            tokenizer and safetensors.
        revision: full commit on the hub; None: that of the preset, else the newest (pin it for figures that are to be remade).
        label: which label, looked up by name; None: that of the preset, else ``toxicity``. Case doesn't matter, and
            ``toxicity`` finds ``toxic``. Hate speech is another thing than toxicity, so it goes by ``hate_speech``.
        activation: ``sigmoid`` (labels by themselves) or ``softmax`` (one label of all). None: the preset's, else by the
            configuration's ``problem_type``, else softmax for two labels and sigmoid for one.
        batch_size: texts at once; texts of like length go together.
        device: torch device the model stays on.
        max_length: tokens read of a text, special ones included.
    """

    is_slow = False

    def __init__(
        self,
        model: str = "toxic-bert",
        revision: str | None = None,
        label: str | None = None,
        activation: str | None = None,
        batch_size: int = 32,
        device: str = "cpu",
        max_length: int = 512,
    ) -> None:
        preset = PRESETS.get(model) or _BY_MODEL.get(model)
        if preset and not (revision or preset.revision):
            raise UserError(
                f"{argument('ClassifierToxicity.revision')}: {preset.model} has no safetensors on its main branch; give the "
                "full commit that has them (it begins with 9165055), or choose "
                f"{argument('ClassifierToxicity.model')}=toxic-bert"
            )
        if activation not in (None, "sigmoid", "softmax"):
            raise UserError(
                f"{argument('ClassifierToxicity.activation')}: expected sigmoid, softmax or null, got {activation!r}"
            )
        if batch_size < 1:
            raise UserError(
                f"{argument('ClassifierToxicity.batch_size')}: expected a whole number above 0, got {batch_size}"
            )
        if max_length < 3:
            raise UserError(
                f"{argument('ClassifierToxicity.max_length')}: expected at least 3 tokens, two of which are special, got "
                f"{max_length}"
            )
        preset = preset or Preset(model, None, "toxicity", None)
        self.model = preset.model
        self.revision = revision or preset.revision
        self.label = _canonical(label or preset.label)
        self.activation = activation or preset.activation
        self.batch_size = batch_size
        self.device = device
        self.max_length = max_length
        self.figure = self.label
        self.name = self._name(self.revision)
        self._classifier: Any = None

    def start(self) -> None:
        """Load the model and its tokenizer, and find the label.

        Raises:
            UserError: not found, no network, no safetensors, no such label or device, an unclear activation, or texts longer
                than the model can read.
        """
        where = str(Path(self.model).expanduser()) if self._is_folder else self.model
        try:
            config = AutoConfig.from_pretrained(where, revision=self.revision, trust_remote_code=False)
            # All from one commit; and where "main" lacks safetensors, transformers would have them made by a public service.
            commit = getattr(config, "_commit_hash", None) or self.revision
            options = {"revision": commit, "trust_remote_code": False}
            self._tokenizer = AutoTokenizer.from_pretrained(where, **options)
            model = AutoModelForSequenceClassification.from_pretrained(
                where, config=config, use_safetensors=True, dtype=torch.float32, **options
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise UserError(self._cannot_load(error)) from error
        self._column = _find_label(self.label, config.id2label, self.model)
        self.activation = self.activation or _activation_of(config, self.model)
        self._check_length(config)
        self.name = self._name(commit)
        try:
            self._classifier = model.to(self.device).eval()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{argument('ClassifierToxicity.device')}: can't use {self.device!r} ({reason}); use cpu"
            ) from error

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Score the completions of both models."""
        return toxicity_scores(samples, self.score_texts, figure=self.figure, scorer=self.name, can_cut=True)

    @torch.inference_mode()
    def score_texts(self, texts: Sequence[str]) -> list[TextScore]:
        """Score texts by themselves, in their order; an empty one is missing."""
        if self._classifier is None:
            raise RuntimeError("call start() before scoring")
        scores = [TextScore(math.nan)] * len(texts)
        for rows in self._batches(texts):
            batch = self._tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                split_special_tokens=True,  # a text that spells [SEP] doesn't end there
                return_tensors="pt",
            )
            logits = self._classifier(**batch.to(self.device)).logits
            for row, value in zip(rows, self._probabilities(logits).tolist(), strict=True):
                scores[row] = TextScore(value, self._n_tokens(texts[row]) > self.max_length)
        return scores

    def _probabilities(self, logits: Float[Tensor, "text label"]) -> Float[Tensor, " text"]:
        every = logits.float().sigmoid() if self.activation == "sigmoid" else logits.float().softmax(-1)
        return every[:, self._column]

    def _batches(self, texts: Sequence[str]) -> Iterator[list[int]]:
        rows = sorted((row for row, text in enumerate(texts) if text.strip()), key=lambda row: len(texts[row]))
        for start in range(0, len(rows), self.batch_size):
            yield rows[start : start + self.batch_size]

    def _n_tokens(self, text: str) -> int:
        ids = self._tokenizer(
            text, truncation=True, max_length=self.max_length + 1, split_special_tokens=True
        ).input_ids
        return len(ids)

    @property
    def _is_folder(self) -> bool:
        return self.model.startswith((".", "/", "~")) or Path(self.model).is_dir()

    def _name(self, revision: str | None) -> str:
        version = f"@{revision[:12]}" if revision else "" if self._is_folder else "@main"
        return f"{self.model}{version} label={self.label} max_length={self.max_length}"

    def _check_length(self, config: PretrainedConfig) -> None:
        # RoBERTa's positions begin behind its padding id
        positions = getattr(config, "max_position_embeddings", math.inf)
        if "roberta" in config.model_type:
            positions -= (config.pad_token_id or 0) + 1
        limit = min(self._tokenizer.model_max_length, positions)
        if self.max_length > limit:
            raise UserError(
                f"{argument('ClassifierToxicity.max_length')}: {self.model} reads at most {limit} tokens, got {self.max_length}"
            )

    def _cannot_load(self, error: Exception) -> str:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
        if self._is_folder:
            return (
                f"{argument('ClassifierToxicity.model')}: can't load {self.model} ({reason}); expected config.json, a tokenizer "
                "and safetensors"
            )
        return (
            f"{argument('ClassifierToxicity.model')}: can't load {self.model} from the Hugging Face hub ({reason}); check the "
            "name and the network, give a local folder, or use the word list, which needs neither"
        )


def _canonical(label: str) -> str:
    plain = re.sub(r"[\s-]+", "_", label.strip().lower())
    return next((name for name, spellings in ALIASES.items() if plain in spellings), plain)


def _find_label(label: str, id2label: dict[int, str], model: str) -> int:
    """Column of a label by its name; an index would mean something else in every model."""
    columns = [column for column, name in id2label.items() if _canonical(name) == label]
    if len(columns) != 1:
        raise UserError(
            f"{argument('ClassifierToxicity.label')}: {model} has no label {label}; its labels are "
            f"{', '.join(id2label.values())}: set label to one of them"
        )
    return int(columns[0])


def _activation_of(config: PretrainedConfig, model: str) -> Activation:
    if config.problem_type in _ACTIVATION_OF_PROBLEM:
        return _ACTIVATION_OF_PROBLEM[config.problem_type]
    n_labels = len(config.id2label or ())
    if config.problem_type is None and n_labels <= 2:
        return "sigmoid" if n_labels == 1 else "softmax"
    raise UserError(
        f"{argument('ClassifierToxicity.activation')}: {model} has {n_labels} labels and problem_type {config.problem_type}, "
        f"which says not whether they exclude each other; set {argument('ClassifierToxicity.activation')}=sigmoid or softmax"
    )
