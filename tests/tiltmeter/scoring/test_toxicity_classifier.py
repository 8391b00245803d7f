"""Classifiers of a few hundred weights, made on the spot: what is asked of the real ones is the same."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.text_samples import figure, samples_of
from tiltmeter.errors import UserError
from tiltmeter.scoring.toxicity_classifier import PRESETS, ClassifierToxicity

WORDS = ["you", "are", "a", "nice", "rude", "fool", "friend", "and", "so", "is", "the", "rain"]
LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
TEXTS = ["you are a fool", "nice", "the rain is nice and so are you friend", "", "rude rude rude fool", " \n"]
LONGEST = 16


def make_tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=LONGEST, **names)


def make_classifier(
    folder: Path, family: str = "bert", labels: tuple[str, ...] = LABELS, **options: Any
) -> PreTrainedModel:
    """Save a random classifier whose positions end at LONGEST tokens, and give it back."""
    extra = 1 if family == "roberta" else 0  # its positions begin behind the padding id
    config = AutoConfig.for_model(
        family,
        vocab_size=4 + len(WORDS),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LONGEST + extra,
        type_vocab_size=1 + (family == "bert"),
        pad_token_id=0,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.add_(0.5 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def started(folder: Path, **options: Any) -> ClassifierToxicity:
    scorer = ClassifierToxicity(str(folder), **({"max_length": LONGEST} | options))
    scorer.start()
    return scorer


def logits(model: PreTrainedModel, text: str) -> torch.Tensor:
    with torch.inference_mode():
        return model(**make_tokenizer()(text, return_tensors="pt")).logits[0].double()


def values(scorer: ClassifierToxicity, texts: list[str]) -> list[float]:
    return [score.value for score in scorer.score_texts(texts)]


MULTI = {"problem_type": "multi_label_classification"}


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_scores_are_the_models_own_and_the_same_in_any_batch(family: str, tmp_path: Path) -> None:
    model = make_classifier(tmp_path, family, **MULTI)
    expected = [logits(model, text)[0].sigmoid().item() if text.strip() else math.nan for text in TEXTS]
    assert max(expected[:3]) - min(expected[:3]) > 0.01, "the model must tell texts apart"
    for batch_size in (1, 2, 32):
        assert values(started(tmp_path, batch_size=batch_size), TEXTS) == pytest.approx(expected, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", ["toxic", "Toxicity", "TOXIC "])
def test_the_label_is_found_by_name_wherever_it_stands(name: str, tmp_path: Path) -> None:
    model = make_classifier(tmp_path, labels=("obscene", "threat", name), **MULTI)
    scorer = started(tmp_path)
    assert scorer.figure == "toxicity"
    assert values(scorer, ["nice"]) == pytest.approx([logits(model, "nice")[2].sigmoid().item()], abs=1e-6)


def test_another_label_names_the_figure(tmp_path: Path) -> None:
    model = make_classifier(tmp_path, **MULTI)
    scores = started(tmp_path, label="identity_attack").score(samples_of(["nice"]))
    assert figure(scores, "identity_attack").value == pytest.approx(logits(model, "nice")[5].sigmoid().item(), abs=1e-6)
    assert set(scores.columns) == {"identity_attack/policy", "identity_attack/base"}


@pytest.mark.parametrize(
    ("labels", "options", "activation", "expected"),
    [
        (("neutral", "toxic"), {}, None, "softmax"),
        (("neutral", "toxic"), MULTI, None, "sigmoid"),
        (("neutral", "toxic"), MULTI, "softmax", "softmax"),
        (("neutral", "mean", "toxic"), {"problem_type": "single_label_classification"}, None, "softmax"),
        (("toxic",), {}, None, "sigmoid"),
    ],
)
def test_sigmoid_or_softmax_is_a_rule(
    labels: tuple[str, ...], options: dict[str, Any], activation: str | None, expected: str, tmp_path: Path
) -> None:
    model = make_classifier(tmp_path, labels=labels, **options)
    raw = logits(model, "nice")
    every = raw.softmax(-1) if expected == "softmax" else raw.sigmoid()
    found = values(started(tmp_path, activation=activation), ["nice"])
    assert found == pytest.approx([every[labels.index("toxic")].item()], abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"problem_type": "regression"}])
def test_an_unclear_activation_is_asked_for(options: dict[str, Any], tmp_path: Path) -> None:
    make_classifier(tmp_path, **options)
    with pytest.raises(UserError, match=r"activation: .* has 6 labels .*set activation=sigmoid or softmax"):
        started(tmp_path)


def test_long_texts_are_scored_by_their_beginning_and_counted(tmp_path: Path) -> None:
    make_classifier(tmp_path, **MULTI)
    scorer = started(tmp_path, max_length=6)
    fits, long = "you are a fool", "you are a fool and so is the rain"
    scores = scorer.score_texts([long, fits])
    assert scores[0].value == pytest.approx(scores[1].value, abs=1e-6)
    assert [score.is_cut for score in scores] == [True, False]
    assert figure(scorer.score(samples_of([long, fits])), "toxicity_truncated").value == 0.5


def test_an_empty_completion_is_missing_and_counted(tmp_path: Path) -> None:
    make_classifier(tmp_path, **MULTI)
    found = figure(started(tmp_path).score(samples_of(["nice"] * 29 + [" "])), "toxicity")
    assert (found.n, found.n_missing) == (29, 1)


def test_without_the_label_the_models_labels_are_listed(tmp_path: Path) -> None:
    make_classifier(tmp_path, labels=("nothate", "hate"))
    with pytest.raises(UserError, match=r"^label: .* has no label toxicity; its labels are nothate, hate: set"):
        started(tmp_path)
    assert started(tmp_path, label="hate").figure == "hate_speech"


def test_more_tokens_than_the_model_has_positions_for_are_refused(tmp_path: Path) -> None:
    make_classifier(tmp_path, "roberta", **MULTI)
    with pytest.raises(UserError, match=rf"max_length: .* reads at most {LONGEST} tokens, got 512"):
        started(tmp_path, max_length=512)
    assert started(tmp_path).score_texts(["rain " * 100])[0].is_cut


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    model = make_classifier(tmp_path, **MULTI)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^model: can't load .*safetensors") as caught:
        started(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["toxic-bert", "someone/some-classifier", "/no/such/folder"])
def test_a_model_that_can_not_be_had_is_one_line(model: str) -> None:
    with pytest.raises(UserError, match=r"^model: can't load") as caught:
        ClassifierToxicity(model).start()
    assert "\n" not in str(caught.value)


def test_an_unpinned_model_is_loaded_from_one_commit_which_its_name_then_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is played by a folder whose configuration says which commit it came from."""
    make_classifier(tmp_path, **MULTI)
    commit = "0123456789abcdef" * 2 + "01234567"
    asked: list[str | None] = []
    for auto in (AutoConfig, AutoTokenizer, AutoModelForSequenceClassification):
        load = auto.from_pretrained

        def from_folder(name: str, *, load: Any = load, revision: str | None = None, **options: Any) -> Any:
            if name == "someone/some-classifier":  # the tokenizer asks for the folder's configuration too
                asked.append(revision)
            found = load(tmp_path, **options)
            if isinstance(found, PreTrainedConfig):
                found._commit_hash = commit
            return found

        monkeypatch.setattr(auto, "from_pretrained", from_folder)
    scorer = ClassifierToxicity("someone/some-classifier", max_length=LONGEST)
    scorer.start()
    assert asked == [None, commit, commit]
    assert scorer.name == f"someone/some-classifier@0123456789ab label=toxicity max_length={LONGEST}"


def test_an_unknown_device_is_one_line(tmp_path: Path) -> None:
    make_classifier(tmp_path, **MULTI)
    with pytest.raises(UserError, match=r"device: can't use 'tpu9'"):
        started(tmp_path, device="tpu9")


def test_presets_are_pinned_and_hate_speech_is_not_called_toxicity() -> None:
    for name, preset in PRESETS.items():
        if preset.revision is None:
            with pytest.raises(UserError, match=r"revision: .*has no safetensors on its main branch"):
                ClassifierToxicity(name)
        else:
            assert len(preset.revision) == 40
            assert ClassifierToxicity(name).name == ClassifierToxicity(preset.model).name
            assert f"@{preset.revision[:12]} " in ClassifierToxicity(name).name
    assert ClassifierToxicity().figure == "toxicity"
    assert ClassifierToxicity("hate-speech").figure == "hate_speech"
    assert ClassifierToxicity("unbiased", revision="9165055f").revision == "9165055f"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size: expected a whole number above 0, got 0"),
        ({"max_length": 2}, r"max_length: expected at least 3"),
        ({"activation": "relu"}, r"activation: expected sigmoid, softmax or null, got 'relu'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClassifierToxicity(**options)
