from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from datamodules.tokenization import train_bpe_tokenizer
from tests import stories260k
from tests.tiltmeter.scoring.fake_judge import sample
from tests.tiny_models import ARCHITECTURES, make_model
from tiltmeter.errors import UserError
from tiltmeter.judges import evaluation_steps, local_judge
from tiltmeter.judges.judge import ChatMessage, Question, Reply
from tiltmeter.judges.local_judge import LocalJudge
from tiltmeter.scoring.geval import POINTS, GEvalScorer
from tiltmeter.scoring.win_rate import WinRateScorer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
LETTERS = ("A", "B", "C")
TEXTS = [
    "Which?",
    "Which of the two replies is the better one, all in all?\nBetter reply:",
    "Rate it (1-5):",
    "x " * 40,
]


def saved(folder: Path, family: str, *, template: str | None = None) -> Path:
    tokenizer = train_bpe_tokenizer(["say A or B or C", "rate it 1 or 2 or 3 or 4 or 5", "a tea"] * 9, vocab_size=280)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    size = {"vocab_size": len(tokenizer), "n_positions" if family == "gpt2" else "max_position_embeddings": 2048}
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    assert family in ARCHITECTURES
    make_model(family, attn="eager" if family == "gemma2" else "sdpa", **size, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), "llama")


def question(text: str, choices: tuple[str, ...] = LETTERS, system: str = "You judge.") -> Question:
    messages = (ChatMessage("system", system), ChatMessage("user", text))
    return Question(messages, "t:0", choices=choices, want_probabilities=True, max_tokens=1)


def spoken(text: str, **decoding: Any) -> Question:
    return Question((ChatMessage("user", text),), "t:0", **({"max_tokens": 6} | decoding))


def started(folder: Path, **options: Any) -> LocalJudge:
    judge = LocalJudge(str(folder), **options)
    judge.start(want_probabilities=True)
    return judge


def by_brute_force(folder: Path, prompt: str, choice: str, *, special: bool = True) -> float:
    """Softmax over everything; Σ over every id of the vocabulary that adds the choice to the decoded prompt."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    with torch.no_grad():
        shares = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    before = tokenizer.decode(ids)
    spelt = [i for i in range(len(tokenizer)) if tokenizer.decode([*ids, i]) in (before + choice, f"{before} {choice}")]
    assert spelt
    return float(shares[spelt].sum())


def probabilities(replies: list[Reply]) -> torch.Tensor:
    rows = []
    for reply in replies:
        assert reply.probabilities is not None, reply.reason
        rows.append(list(reply.probabilities.values()))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("text", TEXTS)
def test_probabilities_are_those_of_every_token_that_spells_the_choice(folder: Path, text: str) -> None:
    found = probabilities(started(folder).ask([question(text)]))[0]
    expected = [by_brute_force(folder, f"You judge.\n\n{text}", letter) for letter in LETTERS]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-7)
    assert 0 < found.sum() < 1
    ids = AutoTokenizer.from_pretrained(folder).get_vocab()
    assert {"A", "ĠA"} <= set(ids), "both spellings are tokens here"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_padded_batch_is_as_one_by_one(tmp_path: Path, family: str) -> None:
    folder = saved(tmp_path, family)
    attention = {"attn_implementation": "eager" if family == "gemma2" else "sdpa"}
    questions = [question(text, choices) for text in TEXTS for choices in (LETTERS, POINTS[:3])]
    alone = probabilities([started(folder, batch_size=1, **attention).ask([q])[0] for q in questions])
    together = probabilities(started(folder, batch_size=8, **attention).ask(questions))
    turned = probabilities(started(folder, batch_size=3, **attention).ask(questions[::-1])[::-1])
    assert_close(together, alone, rtol=1e-4, atol=1e-6)
    assert_close(turned, alone, rtol=1e-4, atol=1e-6)
    assert len({tuple(row) for row in alone.tolist()}) == len(questions), "they are different questions"


def test_a_chat_template_lays_the_question_out(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", template=CHATML)
    text = "<|im_start|>system\nYou judge.<|im_end|>\n<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    found = probabilities(started(folder).ask([question("Which?")]))[0]
    expected = [by_brute_force(folder, text, letter, special=False) for letter in LETTERS]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-7)
    plain = probabilities(started(folder, chat_template=False).ask([question("Which?")]))[0]
    assert not torch.allclose(plain, found, rtol=1e-3)


def test_a_template_without_a_system_turn_gets_it_in_front_of_the_users(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", template=NO_SYSTEM)
    text = "<|im_start|>user\nYou judge.\n\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    found = probabilities(started(folder).ask([question("Which?")]))[0]
    assert found[0] == pytest.approx(by_brute_force(folder, text, "A", special=False), rel=1e-4)


def test_a_choice_of_several_tokens_is_a_failure_that_names_it(folder: Path) -> None:
    (reply,) = started(folder).ask([question("Which?", ("A", "neither of them"))])
    assert reply.failure == "api"
    assert "'neither of them' is not a single token" in reply.reason


def test_a_prompt_that_does_not_fit_is_a_failure_and_the_others_are_answered(folder: Path) -> None:
    short, long = started(folder, max_length=100).ask([question("Which?"), question("word " * 200)])
    assert short.probabilities is not None
    assert long.failure == "api"
    assert "has room for 100" in long.reason


def test_a_prompt_that_just_fits_is_answered(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = len(tokenizer("You judge.\n\nWhich?")["input_ids"])
    assert started(folder, max_length=length + 1).ask([question("Which?")])[0].failure is None
    assert started(folder, max_length=length).ask([question("Which?")])[0].failure == "api"


def test_greedy_words_are_the_likeliest_tokens_alone_and_in_a_batch(folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    questions = [spoken(text) for text in TEXTS]
    together = [reply.texts for reply in started(folder).ask(questions)]
    for text, found in zip(TEXTS, together, strict=True):
        ids = tokenizer(text)["input_ids"]
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert found == (tokenizer.decode(ids[start:], skip_special_tokens=True),)


def test_drawn_words_depend_on_seed_and_question_alone(folder: Path) -> None:
    one, other = (spoken(text, n_samples=4, temperature=1.0) for text in TEXTS[:2])
    judge = started(folder)
    torch.manual_seed(1)
    alone = judge.ask([one])[0].texts
    before = torch.get_rng_state()
    together = [reply.texts for reply in judge.ask([other, one])]
    assert torch.equal(before, torch.get_rng_state()), "drawing leaves the trainer's generator alone"
    assert together[1] == alone
    assert len(alone) == 4
    assert len(set(alone)) > 1
    assert alone != together[0]
    assert started(folder, seed=1).ask([one])[0].texts != alone


def test_drawn_tokens_follow_the_models_distribution(folder: Path) -> None:
    """First tokens of 600 draws against the probabilities: no top-k or other default is at work."""
    judge, tokenizer = started(folder), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    ids = tokenizer("Which?")["input_ids"]
    shares = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    texts = judge.ask([spoken("Which?", n_samples=600, temperature=1.0, max_tokens=1)])[0].texts
    decoded = [tokenizer.decode([i], skip_special_tokens=True) for i in range(len(tokenizer))]
    assert len(set(texts)) > 60, "more than the 50 that a default top-k would leave"
    for text in ("a", "e", "A", " A"):
        share = sum(float(p) for p, spelt in zip(shares, decoded, strict=True) if spelt == text)
        assert share > 0, text
        assert abs(texts.count(text) / 600 - share) < 4 * (share * (1 - share) / 600) ** 0.5
    unreadable = sum(float(p) for p, spelt in zip(shares, decoded, strict=True) if spelt == "\ufffd")
    assert abs(texts.count("\ufffd") / 600 - unreadable) < 4 * (unreadable * (1 - unreadable) / 600) ** 0.5


def test_both_scorers_run_on_a_local_judge(folder: Path) -> None:
    samples = [sample(str(i), f"yes {i}", f"no {i}") for i in range(3)]
    judge = LocalJudge(str(folder))
    geval = GEvalScorer(judge, evaluation_steps=["Read it."], criteria={"tone": "Is it kind?"})
    pairs = WinRateScorer(judge, criterion={"tone": "Is it kind?"})
    for scorer in (geval, pairs):
        scorer.start()
        assert not scorer.is_slow
    long = geval.score(samples)
    assert {figure.n for figure in long.figures if figure.name == "geval_score/tone"} == {3}
    scores = pairs.score(samples)
    assert {figure.n for figure in scores.figures if figure.name == "geval_win_rate"} == {3}


def test_out_of_memory_is_a_failure_that_says_what_to_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    judge = started(folder)
    monkeypatch.setattr(LocalJudge, "_last_hidden_states", full)
    replies = judge.ask([question("Which?")] * 2)
    assert [reply.failure for reply in replies] == ["api", "api"]
    assert "lower batch_size" in replies[0].reason


def test_the_unembedding_sees_one_token_of_each_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = started(folder)
    seen: list[tuple[int, ...]] = []
    whole = local_judge.token_log_probs

    def watched(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(tuple(hidden.shape))
        return whole(hidden, *rest)

    monkeypatch.setattr(local_judge, "token_log_probs", watched)
    judge.ask([question(text) for text in TEXTS])
    assert all(shape == (6, 32) for shape in seen), "three letters in two spellings, each from the last state"
    assert len(seen) == len(TEXTS)


def test_the_name_says_model_revision_and_dtype() -> None:
    assert LocalJudge("org/model", revision="abc", dtype="bfloat16").name == "local:org/model@abc bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, r"dtype: expected one of"),
        ({"device": "toaster"}, r"device: expected a device"),
        ({"batch_size": 0}, "batch_size, max_length: expected at least 1"),
        ({"model": ""}, r"model: expected"),
        ({"attn_implementation": "flash"}, "attn_implementation: expected sdpa or eager"),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LocalJudge(**({"model": "org/model"} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template": True}, r"chat_template: .* has none"),
        ({"max_length": 2049}, r"max_length: expected at most 2048"),
    ],
)
def test_what_the_model_can_not_do_is_said_at_the_start(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        started(folder, **options)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model: no such folder"):
        started(tmp_path / "nowhere")


def test_a_real_model_tells_likely_from_unlikely_letters(shared_data: Path, tmp_path: Path) -> None:
    """stories260K: whatever it is asked, its probabilities are those of a full softmax, in a batch and with its own spellings."""
    folder = stories260k.convert(shared_data / "models" / "stories260K", tmp_path)
    texts = ["Once upon a time, there was", "Lily had a big red ball. She", "One day, Tom and"]
    judge = started(folder, chat_template=False)
    asked = [Question((ChatMessage("user", text),), "t:0", ("a", "w", "s"), True, max_tokens=1) for text in texts]
    found = probabilities(judge.ask(asked))
    expected = [[by_brute_force(folder, text, letter) for letter in ("a", "w", "s")] for text in texts]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-7)


def test_a_judge_that_writes_no_steps_leaves_no_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_steps, "_STEPS_TOKENS", 24)
    file = tmp_path / "steps.json"
    judge = LocalJudge(str(folder))
    scorer = GEvalScorer(judge, steps_file=str(file))
    with pytest.warns(UserWarning, match="no evaluation steps for helpfulness"):
        scorer.start()  # a random model writes no list
    assert not file.exists()
