from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.records import PreferencePair
from datamodules.splits import control_labels, count_repeats, split_by_group, with_clean_label
from tests.tiny_models import MemorySource, random_pairs
from tiltmeter.errors import UserError

POOL = MemorySource(60).load()[0]


def grouped(groups: list[int]) -> list[PreferencePair]:
    return [replace(POOL[i], group=f"prompt {group}") for i, group in enumerate(groups)]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(0, 15), st.integers(0, 15), st.integers(0, 9))
def test_splits_share_no_prompt_and_invent_or_repeat_no_pair(
    groups: list[int], val: int, probe: int, seed: int
) -> None:
    pairs = grouped(groups)
    try:
        splits = split_by_group(pairs, sizes={"train": None, "val": val, "probe": probe}, seed=seed)
    except UserError:
        return
    prompts = {name: {pair.group for pair in split} for name, split in splits.items()}
    assert not prompts["train"] & prompts["val"]
    assert not prompts["train"] & prompts["probe"]
    assert not prompts["val"] & prompts["probe"]
    everything = Counter(pair.pair_id for split in splits.values() for pair in split)
    assert set(everything.values()) <= {1}
    assert set(everything) <= {pair.pair_id for pair in pairs}
    assert len(splits["val"]) == val
    assert len(splits["probe"]) == probe
    assert splits["train"]


def test_pairs_of_one_prompt_are_told_to_need_more_prompts() -> None:
    with pytest.raises(
        UserError,
        match=r"60 pairs in 1 prompts are too few .* no prompt may be in two of them, so use pairs of more prompts",
    ):
        split_by_group(grouped([0] * 60), sizes={"train": None, "val": 2, "probe": 2}, seed=0)


@pytest.mark.parametrize("train", [None, 20])
def test_splits_have_the_sizes_asked_for(train: int | None) -> None:
    splits = split_by_group(grouped(list(range(60))), sizes={"train": train, "val": 10, "probe": 5}, seed=0)
    assert {name: len(split) for name, split in splits.items()} == {"train": train or 45, "val": 10, "probe": 5}


def test_held_out_groups_depend_on_the_seed_alone() -> None:
    pairs = grouped([i // 2 for i in range(60)])
    sizes = {"train": None, "val": 8, "probe": 8}
    held = [
        frozenset(pair.pair_id for pair in split_by_group(order, sizes=sizes, seed=seed)["val"])
        for seed, order in ((0, pairs), (0, pairs), (0, pairs[::2] + pairs[1::2]), (1, pairs))
    ]
    assert held[0] == held[1] == held[2]
    assert held[0] != held[3]


def test_a_smaller_training_set_is_a_part_of_the_larger_one_with_the_same_held_out_pairs() -> None:
    large, small = (split_by_group(POOL, sizes={"train": size, "val": 10, "probe": 5}, seed=0) for size in (40, 10))
    assert large["train"][:10] == small["train"]
    assert large["val"] == small["val"]


@pytest.mark.parametrize("sizes", [(60, 1, 0), (None, 30, 30), (None, 61, 0), (1, 0, 60)])
def test_too_few_pairs_for_the_sizes_is_an_error_that_counts_them(sizes: tuple[int | None, int, int]) -> None:
    with pytest.raises(UserError, match="60 pairs in 60 prompts are too few"):
        split_by_group(POOL, sizes=dict(zip(("train", "val", "probe"), sizes, strict=True)), seed=0)


@pytest.mark.parametrize("sizes", [(None, 40, 1), (None, 20, 40)])
def test_held_out_splits_that_stay_too_small_are_an_error(sizes: tuple[int | None, int, int]) -> None:
    pairs = [replace(pair, group=str(min(i, 1))) for i, pair in enumerate(POOL)]
    with pytest.raises(UserError, match="too few"):
        split_by_group(pairs, sizes=dict(zip(("train", "val", "probe"), sizes, strict=True)), seed=0)


def test_a_validation_file_of_which_no_pair_is_asked_for_is_refused() -> None:
    pairs = [replace(pair, held_out=i < 5) for i, pair in enumerate(POOL)]
    with pytest.raises(UserError, match=r"data.validation_path: nothing is held out with datamodule.val_pairs=0"):
        split_by_group(pairs, sizes={"train": None, "val": 0, "probe": 0}, seed=0)


FLIPPED = replace(
    POOL[0],
    attributes={"label_flipped": True, "utility_gap": -1.5, "chosen/tone": 0, "rejected/tone": 1, "topic": "tea"},
)


def test_a_flipped_label_is_undone_with_everything_that_belongs_to_its_sides() -> None:
    clean = with_clean_label(FLIPPED)
    assert (clean.chosen, clean.chosen_text) == (FLIPPED.rejected, FLIPPED.rejected_text)
    assert (clean.rejected, clean.rejected_text) == (FLIPPED.chosen, FLIPPED.chosen_text)
    assert clean.attributes == {
        "label_flipped": False,
        "utility_gap": 1.5,
        "chosen/tone": 1,
        "rejected/tone": 0,
        "topic": "tea",
    }
    assert with_clean_label(clean) is clean
    assert with_clean_label(POOL[1]) is POOL[1]


def test_held_out_pairs_are_clean_and_training_pairs_keep_their_flips() -> None:
    pairs = [replace(pair, attributes={"label_flipped": True}) for pair in POOL]
    splits = split_by_group(pairs, sizes={"train": None, "val": 10, "probe": 10}, seed=0)
    flips = {name: {pair.attributes["label_flipped"] for pair in split} for name, split in splits.items()}
    assert flips == {"train": {True}, "val": {False}, "probe": {False}}


def test_label_controls_swap_all_none_or_about_half() -> None:
    pairs = random_pairs(400)
    swapped = control_labels(pairs, "swapped", seed=0)
    assert [(p.prompt_ids, p.rejected_ids, p.chosen_ids) for p in swapped] == pairs
    assert control_labels(swapped, "swapped", seed=0) == pairs
    assert control_labels(pairs, "given", seed=0) == pairs
    shuffled = control_labels(pairs, "shuffled", seed=0)
    assert shuffled == control_labels(pairs, "shuffled", seed=0) != control_labels(pairs, "shuffled", seed=1)
    assert all(a in (b, c) for a, b, c in zip(shuffled, pairs, swapped, strict=True))
    assert 150 < sum(a == b for a, b in zip(shuffled, swapped, strict=True)) < 250


def test_random_pairs_have_responses_of_two_other_prompts_and_prompts_alone_hold_no_preference() -> None:
    pairs = random_pairs(50)
    mixed = control_labels(pairs, "random_pairs", seed=0)
    assert mixed == control_labels(pairs, "random_pairs", seed=0) != control_labels(pairs, "random_pairs", seed=1)
    for own, pair in zip(pairs, mixed, strict=True):
        assert pair.prompt_ids == own.prompt_ids
        room = max(map(len, own[1:]))
        assert 0 < len(pair.chosen_ids) <= room
        assert 0 < len(pair.rejected_ids) <= room
        sources = [
            {i for i, p in enumerate(pairs) if p[side][: len(pair[side])] == pair[side] and p is not own}
            for side in (1, 2)
        ]
        assert all(sources)
    alone = control_labels(pairs, "prompts", seed=0)
    long = [(p, own) for p, own in zip(alone, pairs, strict=True) if len(own.prompt_ids) > 1]
    assert long
    assert all([*p.prompt_ids, *p.chosen_ids] == list(own.prompt_ids) for p, own in long)


def test_repeated_and_contradictory_pairs_are_counted() -> None:
    pair = POOL[0]
    turned = replace(pair, chosen_text=pair.rejected_text, rejected_text=pair.chosen_text)
    assert count_repeats([pair, POOL[1], pair, turned]) == {"repeated pairs": 1, "contradictory pairs": 1}
    assert count_repeats(POOL) == {}
