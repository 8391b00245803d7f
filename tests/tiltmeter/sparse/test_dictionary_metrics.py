"""Metrics of dictionaries against sums by hand, a second implementation, and cases whose answer is known."""

import itertools
import math

import pytest
import torch

from tests.tiltmeter.sparse.dictionaries import noise
from tiltmeter.sparse.dictionary_metrics import (
    DENSITY_EDGES,
    DictionaryStatistics,
    activation_f1,
    loss_recovered,
    match_dictionary,
)


def statistics_of(states: torch.Tensor, features: torch.Tensor, made: torch.Tensor, cut: int) -> DictionaryStatistics:
    found = DictionaryStatistics(states.shape[1], features.shape[1])
    for part in zip(states.split(cut), features.split(cut), made.split(cut), strict=True):
        found.update(*part)
    return found


@pytest.mark.parametrize("cut", [1, 3, 50])
def test_streamed_statistics_are_those_of_the_whole_far_from_0_too(cut: int) -> None:
    states = noise(50, 4, dtype=torch.float64) + 1e6
    features = noise(50, 8, seed=1, dtype=torch.float64).relu()
    features[:, 5] = 0
    made = states + 0.5 * noise(50, 4, seed=2, dtype=torch.float64)
    found = statistics_of(states, features, made, cut)
    l0 = sum(float(x > 0) for row in features for x in row) / 50
    unexplained = float(((states - made) ** 2).sum()) / float((states - states.mean(0)).square().sum())
    assert found.l0 == pytest.approx(l0, rel=1e-12)
    assert found.explained_variance == pytest.approx(1 - unexplained, rel=1e-9)
    assert found.dead_share == 1 / 8
    assert found.densities()[0] == float((features[:, 0] > 0).double().mean())


def test_a_perfect_and_a_constant_reconstruction_explain_all_and_nothing() -> None:
    states = noise(40, 3, dtype=torch.float64) + 5
    ones = torch.ones(40, 2, dtype=torch.float64)
    assert statistics_of(states, ones, states, 7).explained_variance == 1
    mean = states.mean(0).expand_as(states)
    assert statistics_of(states, ones, mean, 7).explained_variance == pytest.approx(0, abs=1e-12)


def test_without_rows_nothing_is_known() -> None:
    empty = DictionaryStatistics(3, 4)
    empty.update(torch.zeros(0, 3), torch.zeros(0, 4), torch.zeros(0, 3))
    assert all(math.isnan(x) for x in (empty.l0, empty.explained_variance, empty.dead_share))


def test_density_histogram_counts_every_feature_once() -> None:
    features = torch.zeros(1000, 4)
    features[:1, 1] = features[:100, 2] = features[:, 3] = 1.0
    found = statistics_of(torch.zeros(1000, 2), features, torch.zeros(1000, 2), 100)
    counts, below = found.density_histogram()
    assert (int(counts.sum()), below) == (3, 0.25)
    first, *lines = found.density_table().splitlines()
    assert (first, lines[0]) == ("from,to,features", "0,1e-06,1")
    assert sum(int(line.split(",")[2]) for line in lines) == 4
    assert lines[-1].startswith("0.562,1,")
    where = [i for i, n in enumerate(counts.tolist()) if n]
    for i, density in zip(where, (0.001, 0.1, 1.0), strict=True):
        assert DENSITY_EDGES[i] <= density * (1 + 1e-9)
        assert density <= DENSITY_EDGES[i + 1] * (1 + 1e-9)


def test_loss_recovered_by_hand() -> None:
    assert loss_recovered(2.0, 2.0, 6.0) == 1
    assert loss_recovered(2.0, 6.0, 6.0) == 0
    assert loss_recovered(2.0, 8.0, 6.0) == -0.5
    assert math.isnan(loss_recovered(2.0, 2.0, 2.0))


def test_matching_is_the_best_of_all_permutations() -> None:
    planted, decoder = noise(4, 5, dtype=torch.float64), noise(6, 5, seed=1)
    cosine = [[float(torch.cosine_similarity(p, d.double(), dim=0)) for d in decoder] for p in planted]
    best = max(sum(cosine[i][j] for i, j in enumerate(chosen)) for chosen in itertools.permutations(range(6), 4))
    matched = match_dictionary(decoder, planted.float())
    assert matched.mean_max_cosine == pytest.approx(best / 4, abs=1e-6)
    assert len(set(matched.found.tolist())) == 4


def test_a_shuffled_rescaled_copy_is_found_whole_and_a_negated_one_is_not() -> None:
    planted = noise(5, 32)
    order = torch.tensor([3, 0, 4, 1, 2])
    matched = match_dictionary(planted[order] * torch.tensor([1.0, 2.0, 0.1, 7.0, 3.0])[:, None], planted)
    assert matched.mean_max_cosine == pytest.approx(1, abs=1e-12)
    assert order[matched.found].tolist() == matched.planted.tolist()
    assert match_dictionary(-planted, planted).mean_max_cosine < 0.5


def test_f1_of_activations_by_hand() -> None:
    matched = match_dictionary(torch.eye(3)[[1, 0, 2]], torch.eye(3))
    planted = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0]])
    features = torch.tensor([[0.0, 2, 0], [3, 0, 0], [1, 0, 0]])
    f1 = activation_f1(features, planted, matched)
    assert f1[:2].tolist() == [2 / 3, 1.0]
    assert f1[2].isnan()
