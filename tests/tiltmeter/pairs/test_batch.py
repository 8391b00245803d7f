from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import PreTrainedModel

from tests.tiny_models import EOS, VOCAB, make_model, random_pairs
from tiltmeter.pairs.batch import (
    CHOSEN,
    LAYOUTS,
    PAD,
    PROMPT,
    REJECTED,
    Layout,
    PreferenceBatch,
    StepBatch,
    TokenizedPair,
    attention_mask,
    collate_pairs,
    row_length,
)
from tiltmeter.pairs.log_probs import sequence_log_probs

TWO_RESPONSES: tuple[Layout, ...] = ("shared_prefix", "concatenated")
PAIR = TokenizedPair([1, 5, 9], [6, 2], [7, 8, 2])

segment = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=6)
pair_lists = st.lists(st.builds(TokenizedPair, segment, segment, segment), min_size=1, max_size=5)


@cache
def gpt2() -> PreTrainedModel:
    """Read by many examples, changed by none."""
    return make_model("gpt2", torch.float64)


def log_probs(pairs: list[TokenizedPair], layout: Layout, pad_id: int = 0) -> torch.Tensor:
    batch = collate_pairs(pairs, pair_index=range(len(pairs)), layout=layout, pad_id=pad_id)
    with torch.no_grad():
        return sequence_log_probs(gpt2(), batch)


def test_shared_prefix_row_is_prompt_chosen_rejected_and_positions_restart() -> None:
    batch = collate_pairs([PAIR], pair_index=[7])
    assert batch.input_ids.tolist() == [[1, 5, 9, 6, 2, 7, 8, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert batch.segments.tolist() == [[PROMPT] * 3 + [CHOSEN] * 2 + [REJECTED] * 3]
    assert batch.target_rows.tolist() == [2, 3, 2, 5, 6], "the last prompt token predicts both first tokens"
    assert batch.target_ids.tolist() == [6, 2, 7, 8, 2]
    assert batch.target_sequences.tolist() == [0, 0, 1, 1, 1]
    assert batch.target_counts.tolist() == [2, 3]
    assert batch.pair_index.tolist() == [7]
    assert batch.weights.tolist() == [1.0]


def test_concatenated_rows_are_all_chosen_then_all_rejected() -> None:
    other = TokenizedPair([1], [3], [4, 4])
    batch = collate_pairs([PAIR, other], pair_index=[0, 1], layout="concatenated", weights=[1.0, 0.0])
    assert batch.input_ids.tolist() == [[1, 5, 9, 6, 2, 0], [1, 3, 0, 0, 0, 0], [1, 5, 9, 7, 8, 2], [1, 4, 4, 0, 0, 0]]
    assert batch.position_ids[2].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.segments[1].tolist() == [PROMPT, CHOSEN, PAD, PAD, PAD, PAD]
    assert batch.target_counts.tolist() == [2, 1, 3, 2]
    assert batch.weights.tolist() == [1.0, 0.0]


def test_chosen_only_can_predict_its_prompt_from_the_second_token() -> None:
    batch = collate_pairs([PAIR], pair_index=[0], layout="chosen_only", predict_prompt=True)
    assert batch.target_rows.tolist() == [0, 1, 2, 3]
    assert batch.target_ids.tolist() == [5, 9, 6, 2]
    assert batch.n_sequences == batch.n_pairs == 1


@given(pair_lists, st.sampled_from(LAYOUTS))
def test_every_response_token_is_a_target_once_and_is_predicted_by_the_place_before_it(
    pairs: list[TokenizedPair], layout: Layout
) -> None:
    batch = collate_pairs(pairs, pair_index=range(len(pairs)), layout=layout)
    responses = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    for sequence in range(batch.n_sequences):
        mine = batch.target_sequences == sequence
        assert batch.target_ids[mine].tolist() == list(responses[sequence])
        places = batch.position_ids.flatten()[batch.target_rows[mine]]
        first = len(pairs[sequence % len(pairs)].prompt_ids) - 1
        assert places.tolist() == list(range(first, first + len(responses[sequence])))
    assert not (batch.segments.flatten()[batch.target_rows] == PAD).any()
    assert batch.input_ids.shape[1] == max(row_length(p, layout) for p in pairs)


@given(pair_lists, st.sampled_from(LAYOUTS))
def test_mask_is_causal_hides_chosen_from_rejected_and_pads(pairs: list[TokenizedPair], layout: Layout) -> None:
    segments = collate_pairs(pairs, pair_index=range(len(pairs)), layout=layout).segments
    mask = attention_mask(segments)[:, 0]
    for row, kinds in zip(mask, segments.tolist(), strict=True):
        for query, q in enumerate(kinds):
            for key, k in enumerate(kinds):
                hidden = key > query or k == PAD or q == PAD or (q == REJECTED and k == CHOSEN)
                assert row[query, key].item() == (query == key or not hidden)
    assert mask.any(-1).all(), "no softmax over nothing"


@pytest.mark.parametrize("layout", TWO_RESPONSES)
def test_one_batch_of_eight_equals_eight_batches_of_one(layout: Layout) -> None:
    pairs = random_pairs(8)
    whole = log_probs(pairs, layout).view(2, 8)
    single = torch.stack([log_probs([pair], layout) for pair in pairs], dim=1)
    assert_close(whole, single, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", TWO_RESPONSES)
@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(6)))
def test_order_of_pairs_in_a_batch_changes_nothing(layout: Layout, order: list[int]) -> None:
    pairs = random_pairs(6)
    expected = log_probs(pairs, layout).view(2, 6)[:, order]
    assert_close(log_probs([pairs[i] for i in order], layout).view(2, 6), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", TWO_RESPONSES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_pad_id_changes_no_bit_even_when_it_is_eos_or_a_word(layout: Layout, family: str, attn: str) -> None:
    pairs = [pair._replace(chosen_ids=[*pair.chosen_ids, EOS]) for pair in random_pairs(4)]
    model = make_model(family, attn=attn)
    results = []
    for pad_id in (0, EOS, 17):
        batch = collate_pairs(pairs, pair_index=range(4), layout=layout, pad_id=pad_id)
        assert (batch.segments == PAD).any()
        with torch.no_grad():
            results.append(sequence_log_probs(model, batch))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("layout", TWO_RESPONSES)
def test_amount_of_padding_changes_nothing(layout: Layout) -> None:
    pairs = random_pairs(3)
    long = TokenizedPair([5] * 60, [6] * 50, [7] * 40)
    padded = log_probs([*pairs, long], layout).view(2, 4)[:, :3]
    assert_close(padded, log_probs(pairs, layout).view(2, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "pair",
    [
        TokenizedPair([1], [4], [5]),
        TokenizedPair([1], [4, 6, 7], [5]),
        TokenizedPair([1, 9, 8], [4, 6, 7], [4, 6, 3]),
        TokenizedPair([1, 9], [4, 6], [4, 6, 2]),
        TokenizedPair([1], list(range(3, 43)), [4]),
    ],
    ids=[
        "all of length one",
        "one-token rejected",
        "same first tokens",
        "chosen is a prefix of rejected",
        "long response",
    ],
)
def test_unusual_pairs_score_alike_in_both_layouts(pair: TokenizedPair) -> None:
    assert_close(log_probs([pair], "shared_prefix"), log_probs([pair], "concatenated"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", TWO_RESPONSES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_changing_one_pair_leaves_every_other_pair_bit_identical(layout: Layout, attn: str) -> None:
    pairs = random_pairs(4, longest=7)
    changed = list(pairs)
    changed[2] = TokenizedPair(*([(token + 11) % VOCAB for token in ids] for ids in pairs[2]))
    model = make_model("llama", attn=attn)
    with torch.no_grad():
        before, after = (
            sequence_log_probs(model, collate_pairs(p, pair_index=range(4), layout=layout)).view(2, 4)
            for p in (pairs, changed)
        )
    others = [0, 1, 3]
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.isclose(before[:, 2], after[:, 2]).any()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_rejected_does_not_notice_what_chosen_says(attn: str) -> None:
    model = make_model("llama", attn=attn)
    texts = ([6, 7, 8, 9], [40, 41, 42, 43])
    with torch.no_grad():
        first, second = (
            sequence_log_probs(model, collate_pairs([TokenizedPair([1, 5], chosen, [9, 30, 31])], pair_index=[0]))
            for chosen in texts
        )
    assert torch.equal(first[1], second[1])
    assert not torch.isclose(first[0], second[0])


@pytest.mark.parametrize("empty", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_an_empty_segment_is_refused(empty: str) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        collate_pairs([PAIR._replace(**{empty: []})], pair_index=[0])


def test_predict_prompt_is_refused_where_the_prompt_belongs_to_two_sequences() -> None:
    with pytest.raises(ValueError, match="chosen_only"):
        collate_pairs([PAIR], pair_index=[0], predict_prompt=True)


def test_moving_a_step_keeps_every_field() -> None:
    batch = collate_pairs([PAIR], pair_index=[3], weights=[0.0])
    step = StepBatch([batch], n_pairs=1, n_targets=5, n_tokens=8, n_prompt_tokens=3).to("meta")
    moved: PreferenceBatch = step.micro_batches[0]
    assert moved.layout == batch.layout
    assert moved.input_ids.device.type == moved.weights.device.type == "meta"
    assert (step.n_pairs, step.n_targets, step.n_tokens, step.n_prompt_tokens) == (1, 5, 8, 3)
    assert (step.n_computed, step.n_padding) == (8, 8), "a filler counts as padding"
