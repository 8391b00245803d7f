"""TruthfulQA's figures: those of a straight re-implementation, and under the right name."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests import stories260k
from tests.harness import score_all
from tests.tiltmeter.scoring.questions import PRESET, ROWS, stand_in_preset, write
from tests.tiny_models import make_model, make_tokenizer
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import CausalLM
from tiltmeter.scoring.scorer import Scores
from tiltmeter.scoring.truthfulqa import TruthfulQA, picks_truth, truth_mass


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", torch.float64, vocab_size=280, seed=3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "mc_task.json", ROWS)


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return stand_in_preset(tmp_path, monkeypatch)


def score(scorer: TruthfulQA, model: PreTrainedModel, tokenizer: Any, **options: Any) -> Scores:
    scorer.start()
    return scorer.score(model, tokenizer, **options)


def test_figures_are_those_of_the_straight_implementation(
    data: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    scorer = TruthfulQA(str(data))
    with pytest.raises(ValueError, match="call start"):
        scorer.score(model, tokenizer)
    scores = score(scorer, model, tokenizer)
    expected = score_all(model, tokenizer, ROWS)
    names = {"truthfulqa_mc1": "mc1", "truthfulqa_mc2": "mc2", "truthfulqa_binary": "mc0"}
    for figure, name in zip(scores.figures, names, strict=True):
        assert figure.name == f"{name}_zero_shot"
        values = expected[names[name]]
        assert scores.columns[figure.name] == pytest.approx(values, abs=1e-6)
        assert figure.value == pytest.approx(np.mean(values))
        assert figure.low <= figure.value <= figure.high
        assert (figure.n, figure.n_missing, figure.of) == (5, 0, "policy")
    assert {*expected["mc1"], *expected["mc0"]} == {0.0, 1.0}
    assert 0.05 < np.mean(expected["mc2"]) < 0.95


def test_with_the_harness_prompt_the_figures_have_its_names(
    data: Path, preset: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    scorer = TruthfulQA(str(data), preset_file=str(preset), limit=3)
    scores = score(scorer, model, tokenizer, of="base")
    expected = score_all(model, tokenizer, ROWS[:3], start=PRESET + "\n\n")
    assert scores.columns["truthfulqa_mc2"] == pytest.approx(expected["mc2"], abs=1e-6)
    assert [f.name for f in scores.figures] == ["truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa_binary"]
    assert {f.of for f in scores.figures} == {"base"}
    (name,) = {f.scorer for f in scores.figures}
    assert "0.4.12" in name
    assert "mc_task.json, 3 questions (sha256 " in name
    assert "the harness's prompt" in name
    zero_shot = score_all(model, tokenizer, ROWS[:3])
    assert zero_shot["mc2"] != pytest.approx(expected["mc2"], abs=1e-3)


def test_a_chat_template_has_a_name_of_its_own_and_no_space_before_the_answer(
    data: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    scorer = TruthfulQA(str(data), chat_template=True, limit=2)
    with pytest.raises(UserError, match=r"chat_template=true: this model's tokenizer has no chat template"):
        score(scorer, model, tokenizer)
    chatty = make_tokenizer()
    chatty.bos_token = "<s>"
    chatty.chat_template = "<s>{{ messages[0].content }}{% if add_generation_prompt %} so\n{% endif %}"
    asked = scorer._ask(model, chatty)
    whole = chatty.encode("<s>Q: Is tea rain or seven maps?\nA: so\nrain", add_special_tokens=False)
    place = asked.places[0]["rain"]
    assert [*asked.choices[place].context_ids, *asked.choices[place].ids] == whole
    assert chatty.decode(list(asked.choices[place].ids)) == "\nrain", "white space at the end moves to the answer"
    names = [figure.name for figure in scorer.score(model, chatty).figures]
    assert names == [f"truthfulqa_{kind}_zero_shot_chat" for kind in ("mc1", "mc2", "binary")]


def test_processes_together_give_the_figures_of_one(
    data: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    scorer = TruthfulQA(str(data), tokens_per_batch=60)
    alone = score(scorer, model, tokenizer)
    parts: list[torch.Tensor] = []

    def keep(log_probs: torch.Tensor) -> torch.Tensor:
        parts.append(log_probs)
        return log_probs

    for rank in range(2):
        scorer.score(model, tokenizer, rank=rank, world_size=2, gather=keep)
    together = [
        scorer.score(model, tokenizer, rank=r, world_size=2, gather=lambda _: parts[0] + parts[1]) for r in (0, 1)
    ]
    assert together[0] == together[1] == alone


def test_prompts_that_are_too_long_are_cut_and_counted_and_answers_are_missing(
    data: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    short = make_model("gpt2", torch.float64, vocab_size=280, n_positions=14)
    scores = score(TruthfulQA(str(data)), short, tokenizer)
    expected = score_all(short, tokenizer, ROWS)
    assert scores.columns["truthfulqa_mc2_zero_shot"] == pytest.approx(expected["mc2"], abs=1e-9)
    n_cut = int(sum(scores.columns["truthfulqa_prompt_cut_zero_shot"]))
    assert n_cut > 5
    assert scores.figures[0].scorer.endswith(f", {n_cut} prompts cut on the left")
    long = [ROWS[0] | {"mc2_targets": {"seven blue maps " * 5: 1, "no": 0}}, *ROWS[1:]]
    scores = score(TruthfulQA(str(write(data.with_name("long.json"), long))), short, tokenizer)
    mc1, mc2, _ = scores.figures
    assert math.isnan(scores.columns[mc2.name][0]), "an answer longer than the model can read"
    assert math.isnan(mc2.value), "a fifth is missing"
    assert (mc2.n, mc2.n_missing, mc1.n_missing) == (4, 1, 0)


def test_without_pairs_of_answers_there_is_no_binary_figure(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    mixed = [ROWS[0], {name: value for name, value in ROWS[1].items() if name != "mc0_targets"}]
    scores = score(TruthfulQA(str(write(tmp_path / "mixed.json", mixed))), model, tokenizer)
    assert [figure.name for figure in scores.figures] == ["truthfulqa_mc1_zero_shot", "truthfulqa_mc2_zero_shot"]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"limit": 0}, "limit: .* got 0"), ({"tokens_per_batch": 0}, "tokens_per_batch: .* got 0")],
)
def test_options_out_of_range_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TruthfulQA("x.json", **options)


answers = st.lists(st.tuples(st.floats(-300, 0), st.booleans()), min_size=2, max_size=8).filter(
    lambda some: {is_true for _, is_true in some} == {True, False}
)


@given(answers, st.randoms())
def test_truth_mass_is_the_harness_formula_and_knows_no_order(some: list[tuple[float, bool]], random: Any) -> None:
    values, labels = map(list, zip(*some, strict=True))
    shares = np.exp(values) / np.exp(values).sum()
    mass = truth_mass(values, labels)
    assert mass == pytest.approx(float(shares[np.array(labels)].sum()), abs=1e-12)
    assert truth_mass([v - 5000 for v in values], labels) == pytest.approx(mass, abs=1e-9), "where exp underflows too"
    random.shuffle(some)
    assert truth_mass(*map(list, zip(*some, strict=True))) == pytest.approx(mass, abs=1e-12)
    false_first = [not label for label in labels]
    assert truth_mass(values, false_first) == pytest.approx(1 - mass, abs=1e-12)


def test_one_true_and_one_false_answer() -> None:
    assert picks_truth([-1.0, -2.0], [True, False]) == picks_truth([-2.0, -1.0], [False, True]) == 1.0
    assert picks_truth([-2.0, -1.0], [True, False]) == 0.0
    assert picks_truth([-1.0, -1.0], [True, False]) == 1.0, "the first of equals"
    assert truth_mass([-1.0, -1.0], [True, False]) == 0.5
    for statistic in (picks_truth, truth_mass):
        for bad in (math.nan, -math.inf):
            assert math.isnan(statistic([bad, -1.0], [True, False]))


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Any]:
    folder = stories260k.convert(shared_data / "models" / "stories260K", tmp_path_factory.mktemp("stories260K"))
    spec = CausalLM(name_or_path=str(folder))
    tokenizer = spec.load_tokenizer()
    return spec.build(tokenizer), tokenizer


@pytest.mark.parametrize("name", ["v1_mc_task.part80.json", "mc_task.part80.json"])
def test_a_real_model_on_real_questions_is_scored_as_by_the_harness(
    shared_data: Path, stories: tuple[PreTrainedModel, Any], name: str
) -> None:
    path = shared_data / "truthfulqa" / name
    model, tokenizer = stories
    scores = score(TruthfulQA(str(path), limit=20), model, tokenizer)
    expected = score_all(model, tokenizer, json.loads(path.read_text(encoding="utf-8"))[:20])
    assert scores.columns["truthfulqa_mc1_zero_shot"] == expected["mc1"]
    assert scores.columns["truthfulqa_mc2_zero_shot"] == pytest.approx(
        expected["mc2"], abs=2e-5
    )  # float32, by the processor
    assert 0 < np.mean(expected["mc1"]) < 1
