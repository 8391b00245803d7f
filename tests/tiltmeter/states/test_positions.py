from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tiny_models import BOS, VOCAB, padded_left
from tiltmeter.errors import UserError
from tiltmeter.pairs.batch import (
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
from tiltmeter.states.positions import POSITIONS, Position, check_position, content_tokens, divergence, readings

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


def places(pairs: list[TokenizedPair]) -> list[int | None]:
    """Of the content tokens, by the pair_index of :func:`batch_of`."""
    return [None] * 100 + content_tokens([pair.prompt_ids for pair in pairs])


def tokens_and_places(batch: PreferenceBatch, position: Position, content: list[int | None]) -> list[tuple[int, ...]]:
    found = readings(batch, position, content=content)
    owner = torch.arange(len(found)) if found.reading_of_row is None else found.reading_of_row
    columns = (found.pair_index[owner], found.sides[owner], batch.input_ids.flatten()[found.rows])
    return list(zip(*(c.tolist() for c in (*columns, batch.position_ids.flatten()[found.rows])), strict=True))


@given(pair_lists, st.sampled_from(POSITIONS))
def test_both_layouts_and_both_paddings_read_the_same_tokens_in_the_same_order(
    pairs: list[TokenizedPair], position: Position
) -> None:
    batches = [batch_of(pairs, layout) for layout in ("shared_prefix", "concatenated")]
    batches += [padded_left(batch) for batch in batches]
    content = places(pairs)
    expected = tokens_and_places(batches[0], position, content)
    for batch in batches:
        assert tokens_and_places(batch, position, content) == expected
        assert not (batch.segments.flatten()[readings(batch, position, content=content).rows] == PAD).any()


@given(pair_lists, st.sampled_from(LAYOUTS), st.randoms(use_true_random=False))
def test_pairs_that_only_fill_a_schedule_are_not_read(
    pairs: list[TokenizedPair], layout: Layout, random: Random
) -> None:
    weights = [float(random.random() < 0.5) for _ in pairs]
    real = [100 + i for i, weight in enumerate(weights) if weight]
    for position in POSITIONS:
        if position not in ("diverge", "content"):
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


def test_content_is_read_at_the_drawn_token_of_each_prompt_that_has_one() -> None:
    content: list[int | None] = [None] * 100 + [1, None, 0]
    for layout, rows in (("shared_prefix", [1, 16]), ("concatenated", [1, 12])):
        found = readings(batch_of(PAIRS, layout), "content", content=content)  # type: ignore[arg-type]
        assert found.rows.tolist() == rows
        assert found.pair_index.tolist() == [100, 102]
        assert found.sides.tolist() == [PROMPT, PROMPT]
    with pytest.raises(UserError, match="content needs the place of each prompt's content token"):
        readings(batch_of(PAIRS, "shared_prefix"), "content")


TEMPLATE = ([BOS, 5, 6], [7, 8])
PROMPTS = [[*TEMPLATE[0], *words, *TEMPLATE[1]] for words in ([20], [21, 22], [23, 24, 25], [26, 5, 27, 20])]
"""Planted: BOS, markers and a template around words of their own; marker 5 also stands among the words."""


def test_content_is_never_a_token_that_all_prompts_share_nor_the_last() -> None:
    for seed in range(40):
        for prompt, place in zip(PROMPTS, content_tokens(PROMPTS, seed=seed), strict=True):
            assert place is not None
            assert prompt[place] >= 20
    assert content_tokens([[BOS, 5, 20], [BOS, 5, 21]]) == [None, None], "their own token is the last"
    assert content_tokens([PROMPTS[0], PROMPTS[0]]) == [None, None], "one prompt twice shares all with itself"


def test_every_content_token_is_drawn_by_some_seed_and_one_seed_draws_the_same_again() -> None:
    drawn = [content_tokens(PROMPTS, seed=seed) for seed in range(200)]
    assert {found[2] for found in drawn} == {3, 4, 5}
    shares = [sum(found[2] == place for found in drawn) / 200 for place in (3, 4, 5)]
    assert all(0.2 < share < 0.47 for share in shares)
    assert drawn[7] == content_tokens(PROMPTS, seed=7)


def test_content_depends_on_the_prompt_alone_not_on_its_place_or_number() -> None:
    whole = content_tokens(PROMPTS)
    order = [2, 0, 3, 1, 0]
    assert content_tokens([PROMPTS[i] for i in order]) == [whole[i] for i in order]


def test_a_prompt_that_lost_its_markers_to_truncation_makes_them_no_content() -> None:
    many = [[BOS, 5, 20 + i, 7] for i in range(39)]
    found = content_tokens([*many, [60, 61, 62]])
    assert [prompt[place] for prompt, place in zip(many, found, strict=False) if place is not None] == list(
        range(20, 59)
    )


def test_a_batch_without_a_reading_gives_an_empty_one() -> None:
    found = readings(batch_of(PAIRS[2:], "shared_prefix"), "diverge")
    assert len(found) == 0
    assert found.gather(torch.zeros(1, 5, 4)).shape == (0, 4)
