"""Completions: what a model says one prompt at a time, whatever the batch, the process or the state it is left in."""

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny_models import BOS, EOS, PAD, VOCAB, make_model
from tiltmeter.errors import UserError
from tiltmeter.models.generation import Completion, Decoding, count_batches, generate
from tiltmeter.pairs.packing import use_packed_attention

KINDS = (("llama", torch.float64, "sdpa"), ("gpt2", torch.float64, "eager"), ("gemma2", torch.float32, "eager"))
ENDS = (5, EOS)  # the tokenizer's, and the one that the model's own file names
SPECIAL = (PAD, BOS, *ENDS)


def spelling() -> PreTrainedTokenizerFast:
    """A tokenizer in which an id is its number."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token=str(PAD)))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=str(PAD), bos_token=str(BOS), eos_token=str(ENDS[0])
    )


def make_prompts(n: int = 7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [[BOS, *torch.randint(6, VOCAB, (1 + 3 * i,), generator=generator).tolist()] for i in range(n)]


def say(model: PreTrainedModel, prompts: list[list[int]], decoding: Decoding, **options: Any) -> list[list[Completion]]:
    return generate(model, spelling(), prompts, decoding, **options)


def greedy_by_hand(model: PreTrainedModel, prompt: list[int], n: int) -> Completion:
    """The likeliest token from the whole text again and again: no cache, no padding."""
    ids: list[int] = []
    while len(ids) < n:
        token = int(model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1].argmax())
        if token in ENDS:
            break
        ids.append(token)
    return Completion(" ".join(str(i) for i in ids if i not in SPECIAL), len(ids), is_cut=len(ids) == n)


@pytest.mark.parametrize(("family", "dtype", "attention"), KINDS)
@torch.no_grad()
def test_greedy_completions_are_those_of_one_prompt_at_a_time(family: str, dtype: torch.dtype, attention: str) -> None:
    model, prompts = make_model(family, dtype, attention), make_prompts()
    said = say(model, prompts, Decoding(max_new_tokens=12), tokens_per_batch=70)
    assert count_batches([len(p) for p in prompts], Decoding(max_new_tokens=12), tokens_per_batch=70) > 2
    assert said == [[greedy_by_hand(model, prompt, 12)] for prompt in prompts]


@torch.no_grad()
def test_packed_attention_generates_like_any_other() -> None:
    model, prompts = make_model("llama", torch.float64), make_prompts()
    plain = say(model, prompts, Decoding(max_new_tokens=12))
    use_packed_attention(model)
    assert say(model, prompts, Decoding(max_new_tokens=12)) == plain


def test_a_sample_depends_on_its_prompt_and_the_seed_alone() -> None:
    model, prompts = make_model("llama", torch.float64), make_prompts()
    decoding = Decoding(max_new_tokens=8, temperature=1.0, top_p=0.9, n_samples=3)
    keys = [f"pair/{i}" for i in range(len(prompts))]
    together = say(model, prompts, decoding, keys=keys)
    assert [len(samples) for samples in together] == [3] * len(prompts)
    assert len({sample.text for sample in together[0]}) > 1
    for i in (0, 5):
        assert say(model, [prompts[i]], decoding, keys=[keys[i]], tokens_per_batch=1) == [together[i]]
    other = say(model, prompts, Decoding(max_new_tokens=8, temperature=1.0, top_p=0.9, n_samples=3, seed=1), keys=keys)
    assert other != together


def test_samples_are_distributed_as_the_model_says() -> None:
    model = make_model("llama", torch.float64)
    prompt, n = make_prompts()[2], 4000
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(0)
    samples = say(model, [prompt], Decoding(max_new_tokens=1, temperature=1.5, n_samples=n))[0]
    counts = torch.bincount(torch.tensor([int(s.text) for s in samples if s.text]), minlength=VOCAB)
    plain = torch.tensor([token not in SPECIAL for token in range(VOCAB)])  # special tokens are not in the text
    common = plain & (expected * n > 5)
    seen = torch.cat([counts[common], (n - counts[common].sum())[None]]).double()
    hoped = torch.cat([expected[common], (1 - expected[common].sum())[None]]) * n
    assert len(seen) > 20
    assert chisquare(seen, hoped * seen.sum() / hoped.sum()).pvalue > 1e-3


def test_top_p_leaves_the_tail_out() -> None:
    model, prompt = make_model("llama", torch.float64), make_prompts()[2]
    with torch.no_grad():
        p = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(0)
    order = p.argsort(descending=True)
    kept = set(order[: int((p[order].cumsum(0) < 0.5).sum()) + 1].tolist())
    samples = say(model, [prompt], Decoding(max_new_tokens=1, temperature=1.0, top_p=0.5, n_samples=300))[0]
    assert {int(s.text) for s in samples if s.text} == kept - set(SPECIAL)


def test_the_model_and_the_random_numbers_are_left_as_they_were() -> None:
    model = make_model("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    own = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_new_tokens=1)
    model.generation_config = own
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plain = make_model("llama")
    said = say(model, make_prompts(), Decoding(max_new_tokens=6))
    assert said == say(plain, make_prompts(), Decoding(max_new_tokens=6)), "the model's own decoding had a say"
    say(model, make_prompts(), Decoding(max_new_tokens=6, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.generation_config is own


def test_filler_batches_change_no_completion() -> None:
    model, prompts, calls = make_model("llama", torch.float64), make_prompts(2), []
    model.register_forward_hook(lambda *_: calls.append(1))
    plain = say(model, prompts, Decoding(max_new_tokens=4))
    n_plain = len(calls)
    assert say(model, prompts, Decoding(max_new_tokens=4), n_batches=3) == plain
    assert len(calls) > n_plain
    assert say(model, [], Decoding(max_new_tokens=4), n_batches=1) == []


def test_a_stop_text_ends_a_completion_and_is_no_part_of_it() -> None:
    model, prompts = make_model("llama", torch.float64), make_prompts()
    plain = [said[0] for said in say(model, prompts, Decoding(max_new_tokens=8, temperature=1.0))]
    for prompt_index, whole in enumerate(plain):
        words = whole.text.split()
        if len(words) < 6 or len(set(words)) < len(words):
            continue
        stop = [f"{words[3]} {words[4]}", "never said"]
        decoding = Decoding(max_new_tokens=8, temperature=1.0, stop=stop)
        stopped = say(model, prompts, decoding)[prompt_index][0]
        assert stopped.text == " ".join(words[:3]) + " "
        assert not stopped.is_cut
        assert stopped.ids == whole.ids[: stopped.n_tokens]
        assert stopped.ids[-1] == int(words[4])
        return
    raise AssertionError("no completion of six different words to test with")


def test_nan_logits_are_refused() -> None:
    model = make_model("gemma2", torch.float64, "eager")  # padded rows overflow in its float32 softmax
    with pytest.raises(UserError, match="NaN"):
        say(model, make_prompts(), Decoding(max_new_tokens=2))


def test_a_long_prompt_loses_its_beginning_but_not_its_bos() -> None:
    model = make_model("llama", torch.float64, max_position_embeddings=20)
    long = [BOS, *range(6, 50)]
    assert say(model, [long], Decoding(max_new_tokens=8)) == say(
        model, [[BOS, *long[-11:]]], Decoding(max_new_tokens=8)
    )
    with pytest.raises(UserError, match="max_new_tokens"):
        say(model, [long], Decoding(max_new_tokens=20))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p"),
        ({"n_samples": 2}, "temperature=0"),
        ({"stop": [""]}, "stop"),
        ({"top_p": 0.9}, "temperature=0"),
    ],
)
def test_contradictory_decoding_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Decoding(**options)
