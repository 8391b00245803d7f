"""The planted oracle: verdicts are those of the world's utility, and text that is none of the world's never wins."""

import math
from typing import Any

import pytest

from datamodules.oracle import PlantedOracle
from datamodules.synthetic import SyntheticWorld
from tiltmeter.errors import UserError
from tiltmeter.models.generation import Completion
from tiltmeter.scoring.scorer import LabelledPair, Sample, as_metrics, start_scorers


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(n_prompts=60, label_noise=0.0)


@pytest.fixture(scope="module")
def oracle(world: SyntheticWorld) -> PlantedOracle:
    made = PlantedOracle(world)
    made.start()
    return made


def sample(policy: str, base: str, chosen: str, **attributes: Any) -> Sample:
    texts = (Completion(text, len(text.split()), False) for text in (base, policy))
    return Sample("x", "prompt", chosen, *texts, group="x", attributes={"situation": "howto"} | attributes)


def samples(world: SyntheticWorld, policy: str, base: str) -> list[Sample]:
    """What a pair's own responses give."""
    return [
        sample(getattr(p, policy).content, getattr(p, base).content, p.chosen.content, **p.attributes)
        for p in world.load()[0]
    ]


def test_oracle_prefers_the_chosen_response_and_ties_it_with_itself(
    world: SyntheticWorld, oracle: PlantedOracle
) -> None:
    scores = oracle.score(samples(world, "chosen", "rejected"))
    assert [(f.name, f.of, f.value) for f in scores.figures[:2]] == [
        ("oracle_preference_rate", "both", 1.0),
        ("oracle_preference_rate_vs_chosen", "both", 0.5),
    ]
    policy, base = scores.figures[2:]
    assert (policy.name, policy.of, base.name, base.of) == ("oracle_utility", "policy", "oracle_utility", "base")
    gaps = [float(pair.attributes["utility_gap"]) for pair in world.load()[0]]
    assert policy.value - base.value == pytest.approx(sum(gaps) / len(gaps))
    assert policy.n == 60
    for i, pair in enumerate(world.load()[0]):
        expected = world.score(pair.chosen.content, str(pair.attributes["situation"]))
        assert scores.columns["oracle_utility/policy"][i] == expected
    swapped = oracle.score(samples(world, "rejected", "chosen"))
    assert [figure.value for figure in swapped.figures[:2]] == [0.0, 0.0]


@pytest.mark.parametrize("nothing", ["", " \n", "!?", "zzz qqq", "日本"])
def test_oracle_ranks_text_without_a_word_of_the_world_last(oracle: PlantedOracle, nothing: str) -> None:
    worst = "You idiot! What a stupid thing to ask!"
    one, other, both = oracle.score(
        [sample(nothing, worst, worst), sample(worst, nothing, nothing), sample(nothing, nothing, worst)]
    ).columns["oracle_preference_rate"]
    assert (one, other, both) == (0.0, 1.0, 0.5)
    utility = oracle.score([sample(nothing, worst, worst)]).columns
    assert math.isnan(utility["oracle_utility/policy"][0]), "silence has attributes by convention, no utility"
    assert math.isfinite(utility["oracle_utility/base"][0])


def test_a_sample_of_another_world_has_no_score(oracle: PlantedOracle) -> None:
    strange = [sample("Certainly", "Certainly", "Certainly", situation=situation) for situation in ("party", 3)]
    scores = oracle.score(strange)
    assert all(math.isnan(value) for column in scores.columns.values() for value in column)
    assert [figure.n_missing for figure in scores.figures] == [2] * 4


def test_oracle_without_a_synthetic_world_is_refused_at_the_start(world: SyntheticWorld) -> None:
    late = PlantedOracle()
    with pytest.raises(UserError, match=r"judge=oracle: only for data=synthetic"):
        late.start()
    late.use_world(world)
    late.start()
    assert late.name == "planted oracle of the synthetic world (seed 0, rank 2)"
    assert not late.is_slow
    late.use_world(object())
    with pytest.raises(UserError, match="only for data=synthetic"):
        late.start()


def test_the_oracle_agrees_with_every_clean_label(world: SyntheticWorld) -> None:
    pairs = [
        LabelledPair(p.pair_id, p.prompt_text, p.chosen_text, p.rejected_text, p.group, p.attributes)
        for p in world.load()[0]
    ]
    judge = PlantedOracle(agreement_pairs=50)
    start_scorers([judge], world=world, pairs=pairs)
    found = {f.name: f for f in judge.score([]).figures if f.of == "judge"}
    assert found["judge/agreement"][2:7] == (1.0, pytest.approx(0.025 ** (1 / 50)), 1.0, 50, 0)
    assert found["judge/agreement_ties"].value == 0
    judge.use_labels([pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in pairs])
    assert as_metrics(judge.score([]).figures)["judge/agreement"] == 0
