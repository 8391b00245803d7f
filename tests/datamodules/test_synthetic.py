"""The synthetic world: labels match the words, the planted structure is what it says, seeds repeat to the byte."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from datamodules import synthetic
from datamodules import synthetic_phrases as phrases
from datamodules.records import PreferencePair, transcript
from datamodules.synthetic import SyntheticWorld, detect_attributes
from datamodules.synthetic_phrases import ATTRIBUTES, SITUATIONS
from tiltmeter.errors import UserError

PAIR_TEXTS = ("prompt_text", "chosen_text", "rejected_text")
GOLDEN = "585d0f80d351e305bed5c219d043ecfb71d84c36580034187a272f9102b57e91"  # first 60 pairs, seed 0


def pairs_of(**options: Any) -> list[PreferencePair]:
    return SyntheticWorld(**options).load()[0]


def digest(pairs: list[PreferencePair]) -> str:
    lines = [repr((p.pair_id, *(getattr(p, t) for t in PAIR_TEXTS), p.attributes["label_flipped"])) for p in pairs]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def side(pair: PreferencePair, name: str) -> dict[str, int]:
    return {a: int(pair.attributes[f"{name}/{a}"]) for a in ATTRIBUTES}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld()


@pytest.fixture(scope="module")
def pairs(world: SyntheticWorld) -> list[PreferencePair]:
    return world.load()[0]


def test_the_same_seed_gives_the_same_bytes_everywhere(pairs: list[PreferencePair]) -> None:
    assert digest(pairs) == digest(pairs_of())
    assert digest(pairs_of(n_prompts=60)) == GOLDEN


def test_more_prompts_and_other_noise_leave_the_first_texts_alone(pairs: list[PreferencePair]) -> None:
    assert pairs_of(n_prompts=60) == pairs[:60]
    clean = pairs_of(label_noise=0.0)
    assert not any(p.attributes["label_flipped"] for p in clean)
    for noisy, pair in zip(pairs, clean, strict=True):
        same = (noisy.prompt_text, {noisy.chosen_text, noisy.rejected_text})
        assert same == (pair.prompt_text, {pair.chosen_text, pair.rejected_text})


def test_different_seeds_are_different_worlds(world: SyntheticWorld, pairs: list[PreferencePair]) -> None:
    other = SyntheticWorld(seed=1)
    other_pairs = other.load()[0]
    assert abs(float(world.directions[0] @ other.directions[0])) < 0.9
    assert len({p.prompt_text for p in pairs} & {p.prompt_text for p in other_pairs}) < 0.1 * len(pairs)
    vocabularies = [{w for p in ps for t in PAIR_TEXTS for w in words(getattr(p, t))} for ps in (pairs, other_pairs)]
    assert vocabularies[0] - vocabularies[1]
    assert vocabularies[1] - vocabularies[0]


def test_every_prompt_is_its_own_group_and_every_text_has_its_exact_form(pairs: list[PreferencePair]) -> None:
    assert len({p.group for p in pairs}) == len({p.pair_id for p in pairs}) == len(pairs) == 2000
    assert len({p.prompt[-1].content for p in pairs}) == 2000
    for pair in pairs:
        assert (pair.prompt_text, pair.chosen_text) == transcript(pair.prompt, pair.chosen.content)
        assert (pair.prompt_text, pair.rejected_text) == transcript(pair.prompt, pair.rejected.content)
        assert pair.chosen.content != pair.rejected.content
    assert {len(p.prompt) for p in pairs} == {1, 3}
    counts = Counter(p.attributes["situation"] for p in pairs)
    assert set(counts) == set(SITUATIONS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_as_many_prompts_as_the_world_has_are_all_different() -> None:
    with pytest.raises(UserError) as caught:
        SyntheticWorld(n_prompts=10**6)
    capacity = int(re.findall(r"from 1 to (\d+), got 1000000", str(caught.value))[0])
    assert capacity >= 10_000
    assert len({p.group for p in pairs_of(n_prompts=capacity)}) == capacity


@pytest.mark.parametrize("seed", range(5))
def test_the_labels_can_be_read_back_from_the_words(seed: int) -> None:
    for pair in pairs_of(seed=seed, n_prompts=300):
        assert detect_attributes(pair.chosen.content) == side(pair, "chosen")
        assert detect_attributes(pair.rejected.content) == side(pair, "rejected")


def test_lengths_and_vocabulary_stay_modest(pairs: list[PreferencePair]) -> None:
    prompts = [len(p.prompt[-1].content.split()) for p in pairs]
    responses = [len(m.content.split()) for p in pairs for m in (p.chosen, p.rejected)]
    assert (min(prompts), max(prompts)) >= (8, 15)
    assert max(prompts) <= 28
    assert 12 <= np.mean(prompts) <= 20
    assert (min(responses) >= 15, max(responses) <= 55) == (True, True)
    assert 28 <= np.mean(responses) <= 40
    assert 300 <= len({w for p in pairs for t in PAIR_TEXTS for w in words(getattr(p, t))}) <= 800


def test_chosen_has_the_higher_utility_unless_the_label_was_flipped(
    world: SyntheticWorld, pairs: list[PreferencePair]
) -> None:
    for pair in pairs:
        situation = str(pair.attributes["situation"])
        gap = world.utility(side(pair, "chosen"), situation) - world.utility(side(pair, "rejected"), situation)
        assert gap == pytest.approx(pair.attributes["utility_gap"])
        assert (gap < 0) == pair.attributes["label_flipped"]
        assert abs(gap) >= world.min_gap
        read = world.score(pair.chosen.content, situation) - world.score(pair.rejected.content, situation)
        assert read == pytest.approx(gap)


@pytest.mark.parametrize("label_noise", [0.0, 0.1, 0.5])
def test_the_share_of_flipped_labels_is_the_noise(label_noise: float) -> None:
    flips = [bool(p.attributes["label_flipped"]) for p in pairs_of(n_prompts=3000, label_noise=label_noise)]
    assert np.mean(flips) == pytest.approx(label_noise, abs=4 * math.sqrt(label_noise * (1 - label_noise) / 3000))


@pytest.mark.parametrize("rank", range(1, 7))
def test_the_situation_by_attribute_weights_have_exactly_the_planted_rank(rank: int) -> None:
    world = SyntheticWorld(planted_rank=rank, seed=3, situation_strength=0.8)
    np.testing.assert_allclose(world.directions @ world.directions.T, np.eye(rank), atol=1e-12)
    weights = np.array([[world.utility(_axis(a), s) for a in ATTRIBUTES] for s in SITUATIONS])
    np.testing.assert_allclose(weights, world.situation_weights @ world.directions, atol=1e-12)
    singular = np.linalg.svd(weights, compute_uv=False)
    expected = math.sqrt(6) * np.array([1.0] + [0.8] * (rank - 1))
    np.testing.assert_allclose(singular[:rank], expected, atol=1e-12)
    np.testing.assert_allclose(singular[rank:], 0, atol=1e-12)


def test_a_higher_rank_extends_the_lower_one() -> None:
    low, high = SyntheticWorld(planted_rank=2), SyntheticWorld(planted_rank=4)
    np.testing.assert_array_equal(high.directions[:2], low.directions)
    np.testing.assert_array_equal(high.situation_weights[:, :2], low.situation_weights)


@pytest.mark.parametrize("seed", range(5))
def test_rudeness_never_pays_and_the_first_direction_does_not_favour_refusal(seed: int) -> None:
    world = SyntheticWorld(seed=seed, planted_rank=6)
    for situation in SITUATIONS:
        assert world.utility(_axis("tone"), situation) == pytest.approx(synthetic.TONE_WEIGHT)
    assert world.directions[0][ATTRIBUTES.index("refusal")] <= 0


def test_one_direction_explains_a_world_of_rank_one_and_no_other() -> None:
    def explained(rank: int, strength: float = 0.5) -> float:
        world = SyntheticWorld(planted_rank=rank, label_noise=0.0, situation_strength=strength)
        gaps = [_axes(side(p, "chosen")) - _axes(side(p, "rejected")) for p in world.load()[0]]
        return float(np.mean(np.array(gaps) @ world.directions[0] > 0))

    assert explained(1) == 1.0
    assert explained(6) < explained(3) < explained(2) < 0.99
    assert explained(2, strength=1.0) < 0.92


def test_each_phrase_speaks_for_its_own_level_only() -> None:
    owner = {word: key for key, markers in phrases.MARKERS.items() for word in markers}
    assert len(owner) == sum(map(len, phrases.MARKERS.values()))
    for key, table in phrases.PHRASES.items():
        expected = set() if key[0] == "question" else {key}
        for phrase in table:
            assert {owner[w] for w in words(phrase) if w in owner} == expected, phrase
            assert phrase.endswith("?") == (key[0] == "question")
            assert "!" not in phrase
    neutral = [phrases.ANSWERS, phrases.TRICKS, phrases.TOPICS, phrases.OPENERS, phrases.TEMPLATES, phrases.GREETINGS]
    fillers = [phrases.TROUBLES, phrases.MOODS, phrases.OCCASIONS, phrases.MISDEEDS, phrases.WATCHERS]
    for text in _strings([neutral, fillers]):
        assert not set(words(text)) & set(owner), text
    for text in _strings([phrases.ANSWERS, phrases.TRICKS, [tips for _, _, tips in phrases.TOPICS.values()]]):
        assert not set(text) & set("?!"), text


def test_any_text_can_be_read_for_its_attributes() -> None:
    assert detect_attributes("") == {
        "tone": 0, "refusal": -1, "hedging": 0, "length": -1,
        "formality": 0, "example": -1, "excitement": -1, "question": -1,
    }  # fmt: skip
    heard = detect_attributes("Dude, you IDIOT: I cannot, dear idiot. For example? Certainly!")
    assert (heard["tone"], heard["refusal"], heard["formality"], heard["example"]) == (-1, 1, -1, 1)
    assert (heard["excitement"], heard["question"], heard["hedging"]) == (1, 1, 0)


def test_the_report_says_what_was_planted(world: SyntheticWorld) -> None:
    pairs, [report] = SyntheticWorld(n_prompts=200, seed=7, planted_rank=3, label_noise=0.25).load()
    assert (report.source, report.location, report.n_rows, report.n_kept) == ("synthetic", "seed 7", 200, 200)
    n_flipped = sum(bool(p.attributes["label_flipped"]) for p in pairs)
    assert report.notes["label noise"].startswith(f"{n_flipped} pairs swapped")
    assert report.notes["planted preference"].startswith("rank 3, first direction mostly ")
    assert len(report.notes) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_noise": 0.6}, r"data\.label_noise: expected 0 ≤ label_noise ≤ 0\.5, got 0\.6"),
        ({"label_noise": -0.1}, r"data\.label_noise: .* got -0\.1"),
        ({"label_noise": "10 %"}, r"data\.label_noise: .* got '10 %'"),
        ({"label_noise": float("nan")}, r"data\.label_noise: .* got nan"),
        ({"planted_rank": 0}, r"data\.planted_rank: expected a whole number from 1 to 6, got 0"),
        ({"planted_rank": 7}, r"got 7"),
        ({"planted_rank": 2.0}, r"got 2\.0"),
        ({"n_prompts": 0}, r"data\.n_prompts: expected a whole number from 1 to \d+, got 0"),
        ({"n_prompts": True}, r"got True"),
        ({"seed": "x"}, r"data\.seed: expected a whole number, got 'x'"),
        ({"min_gap": 0}, r"data\.min_gap: expected 0 < min_gap ≤ 1\.9, got 0"),
        ({"min_gap": 3.0}, r"got 3\.0"),
        ({"situation_strength": 0}, r"data\.situation_strength: expected 0 < situation_strength ≤ 2\.0, got 0"),
    ],
)
def test_values_out_of_range_are_named_by_key(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SyntheticWorld(**options)


def test_a_question_about_an_unknown_situation_or_attribute_is_refused(world: SyntheticWorld) -> None:
    with pytest.raises(UserError, match="got 'party' and no missing level"):
        world.utility(_axis("tone"), "party")
    with pytest.raises(UserError, match="no refusal, hedging"):
        world.utility({"tone": 1}, "howto")


def _axis(name: str) -> dict[str, float]:
    return {a: float(a == name) for a in ATTRIBUTES}


def _axes(levels: dict[str, int]) -> np.ndarray:
    return np.array([levels[a] for a in ATTRIBUTES], dtype=float)


def _strings(table: Any) -> Iterator[str]:
    if isinstance(table, str):
        yield table
    else:
        for item in table.values() if isinstance(table, dict) else table:
            yield from _strings(item)


def test_paraphrases_ask_the_same_by_other_words_behind_another_opener() -> None:
    world = SyntheticWorld(n_prompts=120)
    pairs, others = world.load()[0], world.paraphrases()
    assert list(others) == [pair.pair_id for pair in pairs]
    for pair in pairs:
        own, other = pair.prompt[-1].content, others[pair.pair_id][-1].content
        assert others[pair.pair_id][:-1] == pair.prompt[:-1], "the same greeting"
        assert own.split(". ")[0] != other.split(". ")[0]
        situation = str(pair.attributes["situation"])
        filled = {
            template.format(**words)
            for template in phrases.TEMPLATES[situation]
            for topic, words in world._fillings[situation]
            if any(own.endswith(each.format(**words)) for each in phrases.TEMPLATES[situation])
        }
        assert any(other.endswith(text) for text in filled), "another template of the same request"
        assert not own.endswith(next(text for text in filled if other.endswith(text)))


def test_world_on_other_topics_has_the_same_preferences_and_none_of_its_topics() -> None:
    world = SyntheticWorld(n_prompts=120, label_noise=0.0)
    own, other = world.load()[0], world.on_other_topics().load()[0]
    assert [pair.pair_id for pair in other] == [pair.pair_id for pair in own]
    assert not {p.attributes["topic"] for p in other} & {p.attributes["topic"] for p in own} - {"mischief"}
    for one, two in zip(own, other, strict=True):
        same = {key for key, value in one.attributes.items() if two.attributes[key] == value}
        assert set(one.attributes) - same <= {"topic"}
    assert world.load()[0] == own, "the world itself is as it was"
