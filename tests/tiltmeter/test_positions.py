from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tiny_models import VOCAB, padded_left
from tiltmeter.batch import (
    CHOSEN,
    LAYOUTS,
    PAD,
    PROMPT,
    REJECTED,
    Layout,
    PreferenceBatch,
    TokenizedPair,
    collate_pairs,
)
from tiltmeter.errors import UserError
from tiltmeter.positions import POSITIONS, Position, check_position, divergence, readings

PAIRS = [
    TokenizedPair([1, 5, 9], [6, 2], [7, 8, 2]),  # part at once
    TokenizedPair([1], [3, 4, 2], [3, 4, 9, 2]),  # part at the third token
    TokenizedPair([1, 4], [6], [6, 2]),  # chosen begins rejected: never part
]
"""shared_prefix, width 8: 0 1 2|3 4|5 6 7 / 8|9 10 11|12 13 14 15 / 16 17|18|19 20;
concatenated, width 6: 0 1 2|3 4 / 6|7 8 9 / 12 13|14 / 18 19 20|21 22 23 / 24|25 26 27 28 / 30 31|32 33."""

segment = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=6)
pair_lists = st.lists(st.builds(TokenizedPair, segment, segment, segment), min_size=1, max_size=5)


def batch_of(pairs: list[TokenizedPair], layout: Layout, weights: list[float] | None = None) -> PreferenceBatch:
    return collate_pairs(pairs, pair_index=range(100, 100 + len(pairs)), layout=layout, weights=weights)


@pytest.mark.parametrize(
    ("position", "shared", "concatenated"),
    [
        ("prompt_last", [2, 8, 17], [2, 6, 13]),
        ("diverge", [2, 10], [2, 8]),
        ("response_last", [4, 7, 11, 15, 18, 20], [4, 23, 9, 28, 14, 33]),
        (
            "response_all",
            [3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 18, 19, 20],
            [3, 4, 21, 22, 23, 7, 8, 9, 25, 26, 27, 28, 14, 32, 33],
        ),
    ],
)
def test_rows_are_those_worked_out_by_hand(position: Position, shared: list[int], concatenated: list[int]) -> None:
    assert readings(batch_of(PAIRS, "shared_prefix"), position).rows.tolist() == shared
    assert readings(batch_of(PAIRS, "concatenated"), position).rows.tolist() == concatenated


def test_owners_are_those_worked_out_by_hand() -> None:
    batch = batch_of(PAIRS, "shared_prefix")
    last = readings(batch, "response_last")
    assert last.pairs.tolist() == [0, 0, 1, 1, 2, 2]
    assert last.pair_index.tolist() == [100, 100, 101, 101, 102, 102]
    assert last.sides.tolist() == [CHOSEN, REJECTED] * 3
    assert readings(batch, "prompt_last").sides.tolist() == [PROMPT] * 3
    assert readings(batch, "diverge").pair_index.tolist() == [100, 101]
    mean = readings(batch, "response_mean")
    assert mean.reading_of_row is not None
    assert mean.reading_of_row.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 5, 5]
    assert len(mean) == 6


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
def test_divergence_is_the_first_differing_token_of_both_sides(layout: Layout) -> None:
    found = divergence(batch_of(PAIRS, layout))
    assert found.pairs.tolist() == [0, 1], "a response that begins the other has no token to compare"
    assert found.chosen_ids.tolist() == [6, 2]
    assert found.rejected_ids.tolist() == [7, 9]


def tokens_and_places(batch: PreferenceBatch, position: Position) -> list[tuple[int, ...]]:
    found = readings(batch, position)
    owner = torch.arange(len(found)) if found.reading_of_row is None else found.reading_of_row
    columns = (found.pair_index[owner], found.sides[owner], batch.input_ids.flatten()[found.rows])
    return list(zip(*(c.tolist() for c in (*columns, batch.position_ids.flatten()[found.rows])), strict=True))


@given(pair_lists, st.sampled_from(POSITIONS))
def test_both_layouts_and_both_paddings_read_the_same_tokens_in_the_same_order(
    pairs: list[TokenizedPair], position: Position
) -> None:
    batches = [batch_of(pairs, layout) for layout in ("shared_prefix", "concatenated")]
    batches += [padded_left(batch) for batch in batches]
    expected = tokens_and_places(batches[0], position)
    for batch in batches:
        assert tokens_and_places(batch, position) == expected
        assert not (batch.segments.flatten()[readings(batch, position).rows] == PAD).any()


@given(pair_lists, st.sampled_from(LAYOUTS), st.randoms(use_true_random=False))
def test_pairs_that_only_fill_a_schedule_are_not_read(
    pairs: list[TokenizedPair], layout: Layout, random: Random
) -> None:
    weights = [float(random.random() < 0.5) for _ in pairs]
    real = [100 + i for i, weight in enumerate(weights) if weight]
    for position in POSITIONS:
        if position != "diverge":
            found = readings(batch_of(pairs, layout, weights), position)
            assert sorted(set(found.pair_index.tolist())) == real


@given(pair_lists)
def test_diverge_predicts_both_tokens_after_a_common_beginning(pairs: list[TokenizedPair]) -> None:
    batch = batch_of(pairs, "shared_prefix")
    for i, row, chosen, rejected in zip(*(column.tolist() for column in divergence(batch)), strict=True):
        pair = pairs[i]
        k = int(batch.position_ids.flatten()[row]) + 1 - len(pair.prompt_ids)
        assert list(pair.chosen_ids[:k]) == list(pair.rejected_ids[:k])
        assert (chosen, rejected) == (pair.chosen_ids[k], pair.rejected_ids[k])
        assert chosen != rejected


def test_gathered_readings_are_new_memory_and_means_are_exact_in_any_dtype() -> None:
    batch = batch_of(PAIRS, "shared_prefix")
    hidden = torch.randn(3, 8, 5, generator=torch.manual_seed(0)).to(torch.bfloat16)
    flat = hidden.flatten(0, 1)
    last = readings(batch, "response_last").gather(hidden)
    assert last.dtype == torch.bfloat16
    before = last.clone()
    hidden.zero_()
    assert torch.equal(last, before)
    hidden = flat.new_tensor(torch.randn(3, 8, 5, generator=torch.manual_seed(1)).tolist())
    mean = readings(batch, "response_mean").gather(hidden, torch.float64)
    expected = hidden.double()[0, 3:5].mean(0), hidden.double()[0, 5:8].mean(0)
    assert_close(mean[:2], torch.stack(expected), rtol=1e-15, atol=1e-15)
    with pytest.raises(ValueError, match="3 × 8 tokens, got hidden states of 3 × 1"):
        readings(batch, "response_mean").gather(hidden[:, :1])


def test_what_cannot_be_read_is_refused() -> None:
    alone = batch_of(PAIRS, "chosen_only")
    with pytest.raises(UserError, match="diverge needs chosen and rejected responses"):
        readings(alone, "diverge")
    assert set(readings(alone, "response_mean").sides.tolist()) == {CHOSEN}
    with pytest.raises(UserError, match=r"positions: expected one of prompt_last, .* got 'first'"):
        check_position("first")


def test_a_batch_without_a_reading_gives_an_empty_one() -> None:
    found = readings(batch_of(PAIRS[2:], "shared_prefix"), "diverge")
    assert len(found) == 0
    assert found.gather(torch.zeros(1, 5, 4)).shape == (0, 4)
