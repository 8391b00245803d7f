"""Trained worlds: claims are held against what a quick study has, and which of them are false."""

import yaml

from analysis.claims.claim import make_claims
from benchmarks.trained_worlds import JUDGED, World, claims_of_quick, false_claims, worlds
from datamodules.synthetic import SyntheticWorld
from launch.configuration import CONF


def test_claims_of_a_quick_study_need_no_arm_that_it_lacks() -> None:
    claims = {claim.key: claim for claim in make_claims(claims_of_quick(), where="claims")}
    assert tuple(claims) == JUDGED
    arms = yaml.safe_load((CONF / "study" / "quick.yaml").read_text(encoding="utf-8"))["arms"]
    trained = {arm for arm, seeds in arms.items() if seeds}
    for claim in claims.values():
        assert {*claim.beats} <= trained | {"random_update", "random_update_rotated", "base_states", "permuted"}
        assert "other_corpus" not in [condition.name for condition in claim.survives]
    assert "permuted" in claims["K1"].beats


def test_claims_are_false_where_labels_are_coin_flips() -> None:
    assert false_claims(World("planted", (), has_preference=True)) == frozenset()
    assert {"K1", "K4", "K5"} <= false_claims(World("none", (), has_preference=False))


def test_worlds_are_those_asked_for() -> None:
    found = list(worlds([1, 4], 1))
    assert [world.has_preference for world in found] == [True, True, False]
    for world, rank, noise in zip(found, (1, 4, 2), (0.1, 0.1, 0.5), strict=True):
        options = dict(entry.removeprefix("data.").split("=") for entry in world.overrides)
        made = SyntheticWorld(**{name: yaml.safe_load(value) for name, value in options.items()})
        assert (made.planted_rank, made.label_noise) == (rank, noise)
