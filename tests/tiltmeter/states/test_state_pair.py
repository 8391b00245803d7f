"""Base and policy rows of the same tokens: labels, updates, and what happens to pairs that are left out."""

import math

import pytest
import torch

from tiltmeter.pairs.batch import CHOSEN, PROMPT, REJECTED, TokenizedPair
from tiltmeter.states.capture import HiddenStates, ReadPoint
from tiltmeter.states.state_pair import StatePair

LAST, MEAN = ReadPoint("layer_01", "prompt_last"), ReadPoint("layer_00", "response_mean")
IDS, CLUSTERS = ["a", "b", "c"], ["x", "x", "y"]
TOKENS = [TokenizedPair([i], [1], [2]) for i in range(3)]


def reading(seed: int) -> dict[ReadPoint, HiddenStates]:
    generator = torch.Generator().manual_seed(seed)
    one, two = torch.arange(3), torch.arange(3).repeat_interleave(2)
    return {
        LAST: HiddenStates(torch.randn(3, 4, generator=generator), one, torch.full((3,), PROMPT)),
        MEAN: HiddenStates(torch.randn(6, 4, generator=generator), two, torch.tensor([CHOSEN, REJECTED] * 3)),
    }


def pair(**changes: object) -> StatePair:
    return StatePair(reading(0), reading(1), IDS, CLUSTERS, TOKENS, **changes)  # type: ignore[arg-type]


def test_updates_and_labels_are_by_row_and_points_in_the_order_of_the_forward_pass() -> None:
    states = pair()
    assert states.points == [MEAN, LAST]
    before, after = reading(0)[MEAN].rows.double(), reading(1)[MEAN].rows.double()
    torch.testing.assert_close(states.update(MEAN), after - before, rtol=0, atol=0)
    torch.testing.assert_close(states.steering_vectors()[MEAN], (after - before).mean(0))
    assert states.ids_of(MEAN) == ["a", "a", "b", "b", "c", "c"]
    assert states.clusters_of(LAST) == CLUSTERS
    assert StatePair(reading(0), reading(1)).clusters_of(LAST) == ["0", "1", "2"]
    assert states.at("prompt_last").points == [LAST]
    assert states.has_changed()
    assert not StatePair(reading(0), reading(0)).has_changed()


def test_a_pair_that_is_not_finite_anywhere_is_left_out_everywhere_and_counted() -> None:
    states = pair(n_left_out=2)
    assert states.finite() is states
    states.policy[MEAN].rows[2, 1] = math.inf  # the chosen response of b
    kept = states.finite()
    assert (kept.pair_ids, kept.clusters, kept.tokens) == (["a", "c"], ["x", "y"], [TOKENS[0], TOKENS[2]])
    assert kept.n_left_out == 3
    assert kept.ids_of(MEAN) == ["a", "a", "c", "c"]
    torch.testing.assert_close(kept.update(LAST), states.update(LAST)[[0, 2]], rtol=0, atol=0)


def test_readings_of_other_tokens_are_refused() -> None:
    other = reading(1)
    other[LAST] = other[LAST]._replace(pair_index=torch.tensor([0, 2, 1]))
    with pytest.raises(ValueError, match="rows at layer_01, prompt_last are of other pairs in the two readings"):
        StatePair(reading(0), other)
    with pytest.raises(ValueError, match="of other pairs"):
        StatePair({LAST: reading(0)[LAST]}, reading(1))
