"""Log-likelihoods of many answers: those of one forward pass an answer, whatever is packed, batched or split over processes."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny_models import VOCAB, largest_difference, make_model, make_tokenizer
from tiltmeter.errors import UserError
from tiltmeter.pairs.batch import PAD, PreferenceBatch
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.pairs.packing import PACKED_ATTENTION
from tiltmeter.scoring.multiple_choice import Choice, Document, choice_log_probs, collate_choices, encode_choices

ATTENTION = {"gemma2": "eager"}  # its soft cap needs it, so that nothing can be packed


def random_choices(n_contexts: int, *, seed: int = 0, longest: int = 8) -> list[Choice]:
    """One to five answers a context, of one token and more."""
    rng = np.random.default_rng(seed)

    def ids() -> tuple[int, ...]:
        return tuple(rng.integers(3, VOCAB, rng.integers(1, longest + 1)).tolist())

    contexts = [ids() for _ in range(n_contexts)]
    return [Choice(context, ids()) for context in contexts for _ in range(rng.integers(1, 6))]


@torch.no_grad()
def one_at_a_time(model: PreTrainedModel, choices: Sequence[Choice]) -> Tensor:
    totals = []
    for context_ids, ids in choices:
        whole = torch.tensor([[*context_ids, *ids]])
        table = model(input_ids=whole, use_cache=False).logits[0].double().log_softmax(-1)
        totals.append(sum(table[at - 1, whole[0, at]] for at in range(len(context_ids), whole.shape[1])))
    return torch.stack(totals)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("packed", [None, False])
def test_log_probs_are_those_of_one_forward_a_choice(family: str, dtype: torch.dtype, packed: bool | None) -> None:
    model = make_model(family, dtype, ATTENTION.get(family, "sdpa"))
    choices = random_choices(7)
    assert {len(choice.ids) for choice in choices} >= {1, 2}
    truth = one_at_a_time(model, choices)
    found = choice_log_probs(model, choices, tokens_per_batch=40, packed=packed)
    assert (model.config._attn_implementation == PACKED_ATTENTION) == (packed is None and family != "gemma2")
    assert found.dtype == torch.float64
    exact = dtype == torch.float64 and family == "gpt2"  # others drop to float32 inside their norms
    assert largest_difference(found, truth) < (1e-10 if exact else 1e-5)
    assert truth.abs().max() > 10


def test_the_number_does_not_depend_on_the_batch_or_on_what_else_is_asked() -> None:
    model = make_model("llama", torch.float64)
    choices = random_choices(9, seed=2)
    whole = choice_log_probs(model, choices, tokens_per_batch=10_000)
    for tokens in (1, 17, 60):
        assert largest_difference(choice_log_probs(model, choices, tokens_per_batch=tokens), whole) < 1e-6
    order = np.random.default_rng(0).permutation(len(choices)).tolist()
    shuffled = choice_log_probs(model, [choices[i] for i in order], tokens_per_batch=60)
    assert largest_difference(shuffled, whole[order]) < 1e-6
    assert largest_difference(choice_log_probs(model, choices[3:4]), whole[3:4]) < 1e-6


class Counting:
    """A wrapper as DDP's or FSDP's: runs the model, and counts."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.batches: list[PreferenceBatch] = []

    def __call__(self, batch: PreferenceBatch) -> Tensor:
        self.batches.append(batch)
        assert not self.model.training
        assert not torch.is_grad_enabled()
        return sequence_log_probs(self.model, batch)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world_size", [2, 5, 50])
def test_processes_run_as_many_passes_each_and_their_sum_is_the_whole(packed: bool, world_size: int) -> None:
    model = make_model("llama", torch.float64)
    choices = random_choices(9, seed=1)
    alone = Counting(model)
    whole = choice_log_probs(model, choices, tokens_per_batch=50, packed=packed, forward=alone)
    assert len(alone.batches) % 5, "so that five processes need a filler"
    assert all((batch.packing is not None) == packed for batch in alone.batches)
    assert max(batch.input_ids.numel() for batch in alone.batches) <= 50
    parts, passes = [], set()
    for rank in range(world_size):
        wrapper = Counting(model)
        options = {"packed": packed, "forward": wrapper, "rank": rank, "world_size": world_size}
        parts.append(choice_log_probs(model, choices, tokens_per_batch=50, **options))  # type: ignore[arg-type]
        passes.add(len(wrapper.batches))
    assert passes == {math.ceil(len(alone.batches) / world_size)}
    owners = torch.stack(parts) != 0
    assert owners.sum(0).eq(1).all(), "every answer is computed by one process and counts once"
    assert torch.equal(torch.stack(parts).sum(0), whole)


def test_only_targets_reach_the_unembedding_and_no_last_token_enters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    choices = [Choice((5, 6, 7), (8, 9)), Choice((5, 6, 7), (10,)), Choice((4,), (11, 12, 13))]
    wrapper = Counting(model)
    choice_log_probs(model, choices, packed=True, forward=wrapper)
    (batch,) = wrapper.batches
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 4, 11, 12]]
    assert batch.target_ids.tolist() == [8, 9, 10, 11, 12, 13]
    assert batch.packing is not None
    assert batch.packing.documents == ((3, 1), (1, 2))
    padded = collate_choices([Document((5,), [(8, 9)], [0]), Document((4, 3), [(6, 7, 2)], [1])], packed=False)
    assert padded.input_ids.tolist() == [[5, 8, 0, 0], [4, 3, 6, 7]]
    assert padded.target_rows.tolist() == [0, 1, 5, 6, 7]
    assert (padded.segments == PAD).tolist() == [[False, False, True, True], [False] * 4]


def test_answers_of_one_token_alone_are_packed() -> None:
    model = make_model("gpt2", torch.float64)
    choices = [Choice((5, 6), (8,)), Choice((5, 6), (9,)), Choice((7,), (10,))]
    truth = one_at_a_time(model, choices)
    assert largest_difference(choice_log_probs(model, choices, packed=True), truth) < 1e-10


@pytest.mark.parametrize("packed", [True, False])
def test_a_context_as_long_as_the_limit_is_read_whole(packed: bool) -> None:
    model = make_model("gpt2", torch.float64, n_positions=16)  # learned positions: one more would be an error
    choices = [Choice(tuple(range(3, 19)), (20,)), Choice(tuple(range(3, 15)), (20, 21, 22, 23, 24))]
    found = choice_log_probs(model, choices, packed=packed)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([choices[0].context_ids])).logits[0, -1]
    assert abs(float(found[0] - logits.log_softmax(-1)[20])) < 1e-10


def test_the_model_keeps_its_modes_and_a_wrapped_one_is_left_alone() -> None:
    model = make_model("llama")
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    wrapper = Counting(model)
    choice_log_probs(model, random_choices(2), forward=wrapper)
    assert [module.training for module in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"
    assert wrapper.batches[0].packing is None, "not prepared for packing, and nothing but the wrapper may run it"
    choice_log_probs(model, random_choices(2))
    choice_log_probs(model, random_choices(2), forward=wrapper)
    assert wrapper.batches[-1].packing is not None


def test_a_window_narrower_than_an_answer_is_never_packed() -> None:
    model = make_model("mistral", torch.float64, sliding_window=6)
    choices = random_choices(5, seed=4)
    truth = one_at_a_time(model, choices)
    assert largest_difference(choice_log_probs(model, choices), truth) < 1e-5
    model = make_model("mistral", torch.float64)
    choice_log_probs(model, choices)
    model.config.sliding_window = 6  # prepared for packing, but not for this
    wrapper = Counting(model)
    choice_log_probs(model, choices, forward=wrapper)
    assert all(batch.packing is None for batch in wrapper.batches)


def test_what_makes_no_sense_is_refused() -> None:
    model = make_model("gemma2", attn="eager")
    assert choice_log_probs(model, []).tolist() == []
    with pytest.raises(UserError, match="=sdpa, got eager"):
        choice_log_probs(model, random_choices(1), packed=True)
    for bad in (Choice((), (3,)), Choice((3,), ())):
        with pytest.raises(ValueError, match="at least one token in every context and answer"):
            choice_log_probs(model, [bad])
    for options in ({"tokens_per_batch": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}):
        with pytest.raises(ValueError, match="rank below world_size"):
            choice_log_probs(model, random_choices(1), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def by_the_book(
    tokenizer: PreTrainedTokenizerFast, context: str, continuation: str, limit: int
) -> tuple[list[int], list[int]]:
    """lm-evaluation-harness, a pair at a time: what enters the model, and what is predicted at its end."""
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation, context = context[-n_spaces:] + continuation, context[:-n_spaces]
    whole, start = tokenizer.encode(context + continuation), tokenizer.encode(context)
    predicted = whole[len(start) :]
    return (start + predicted)[-(limit + 1) :][:-1], predicted


texts = st.text(st.sampled_from("abtea \n:?é日"), max_size=12)


@given(texts, st.lists(texts, min_size=1, max_size=4), st.integers(2, 30))
@settings(max_examples=50)
def test_ids_are_those_of_the_harness(
    tokenizer: PreTrainedTokenizerFast, context: str, answers: list[str], limit: int
) -> None:
    context = "Q:" + context
    found = encode_choices(tokenizer, context, answers, max_length=limit)
    n_cut = 0
    for answer, choice in zip(answers, found.choices, strict=True):
        entering, predicted = by_the_book(tokenizer, context, answer, limit)
        if not predicted or len(predicted) > limit:  # the harness asserts there
            assert choice is None
            continue
        assert choice is not None
        assert [*choice.context_ids, *choice.ids[:-1]] == entering
        assert list(choice.ids) == predicted
        n_cut += len(tokenizer.encode(context.rstrip())) + len(predicted) > limit + 1
    assert found.n_cut == n_cut


def test_a_merge_across_the_border_takes_from_the_answer_as_in_the_harness(tokenizer: PreTrainedTokenizerFast) -> None:
    word = next(word for word in ("tea", "rain", "seven") if len(tokenizer.encode(word)) < len(word))
    found = encode_choices(tokenizer, word[:1], [word[1:]])
    whole, start = tokenizer.encode(word), tokenizer.encode(word[:1])
    assert whole[: len(start)] != start
    assert found.choices == [None if len(whole) <= len(start) else Choice(tuple(start), tuple(whole[len(start) :]))]
