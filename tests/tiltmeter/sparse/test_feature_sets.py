"""Sets of sparse features: means, attributes, matched random sets, wrong labels and rank overlap, against what is planted."""

import pytest
import torch
from scipy.stats import spearmanr

from tests.tiltmeter.sparse.dictionaries import noise
from tiltmeter.sparse.feature_sets import (
    FeatureMeans,
    attribute_of_features,
    correlations,
    matched_in_usage,
    most_used,
    random_sets,
    rank_overlap,
    relabelled,
)

USAGE = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 0.5, 0.0, 0.0, 6.0], dtype=torch.float64)


def test_means_are_those_of_all_rows_in_any_cut() -> None:
    rows = noise(11, 4, seed=0) * (noise(11, 4, seed=1) > 0)
    whole, parts = FeatureMeans(4), FeatureMeans(4)
    whole.update(rows)
    for part in rows.split(3):
        parts.update(part)
    for found in (whole, parts):
        torch.testing.assert_close(found.size, rows.double().abs().mean(0))
        torch.testing.assert_close(found.frequency, (rows != 0).double().mean(0))
    assert FeatureMeans(2).size.tolist() == [0.0, 0.0], "of no rows"


def test_correlations_are_pearsons_and_0_where_nothing_varies() -> None:
    features, levels = noise(50, 3, seed=0).double(), noise(50, 2, seed=1).sign().double()
    features[:, 2] = 7.0
    found = correlations(features, levels)
    expected = torch.corrcoef(torch.cat([levels, features[:, :2]], 1).T)[:2, 2:]
    torch.testing.assert_close(found[:, :2], expected)
    assert found[:, 2].tolist() == [0.0, 0.0]


def test_features_get_the_attribute_that_both_halves_agree_on() -> None:
    chosen_on = torch.tensor([[0.8, 0.1, 0.5, -0.6, 0.2], [0.1, 0.7, 0.1, 0.3, 0.1]])
    held_out = torch.tensor([[0.7, 0.1, -0.4, -0.5, 0.9], [0.0, 0.6, 0.1, 0.7, 0.1]])
    found = attribute_of_features(chosen_on, held_out, ["style", "alignment"])
    assert found.attribute.tolist() == [0, 1, -1, 0, -1], "other sign; below the least on the first half"
    assert found.correlation.tolist() == pytest.approx([0.7, 0.6, float("nan"), -0.5, float("nan")], nan_ok=True)
    assert found.disagreement == 0.25, "of four with an attribute one is of the other class on the other half"


def test_attributes_of_noise_are_hardly_ever_confirmed() -> None:
    texts, width = 80, 2000
    halves = [correlations(noise(texts, width, seed=i), noise(texts, 8, seed=9 + i).sign()) for i in (0, 1)]
    found = attribute_of_features(*halves, ["style"] * 8)
    assert float((found.attribute >= 0).double().mean()) < 0.01


def test_random_sets_are_of_used_features_all_equally_likely() -> None:
    drawn = random_sets(USAGE, 2, n_draws=3000, seed=1)
    assert set(drawn.sum(1).tolist()) == {2}
    assert drawn.double().mean(0).tolist() == pytest.approx([0.25 * (u > 0) for u in USAGE.tolist()], abs=0.03)
    assert random_sets(USAGE, 99, n_draws=1, seed=0).tolist() == [(USAGE > 0).tolist()], "there are no more"


def test_sets_matched_in_usage_are_used_as_much_and_never_more() -> None:
    drawn = matched_in_usage(USAGE, 8.0, n_draws=500, seed=1)
    used = drawn.double() @ USAGE
    assert float(used.max()) <= 8.0
    assert float(used.min()) >= 7.5, "as near as the least feature"
    assert len({tuple(row) for row in drawn.tolist()}) > 5


def test_all_features_are_the_only_set_used_as_much_as_all() -> None:
    usage = torch.tensor([9.0, 1.0, 1.0, 0.0, 2.0])
    assert matched_in_usage(usage, 13.0, n_draws=3, seed=0).tolist() == [(usage > 0).tolist()] * 3
    assert not matched_in_usage(usage, 0.0, n_draws=2, seed=0).any()


def test_the_most_used_are_a_share_of_the_used() -> None:
    assert int(most_used(USAGE, 0.0).sum()) == 0
    assert torch.nonzero(most_used(USAGE, 0.01))[:, 0].tolist() == [9]
    assert torch.nonzero(most_used(USAGE, 0.25))[:, 0].tolist() == [0, 9]
    assert most_used(USAGE, 1.0).tolist() == (USAGE > 0).tolist()


@pytest.mark.parametrize("error", [0.0, 0.2, 1.0])
def test_labels_are_wrong_as_often_as_said_and_every_other_class_as_often(error: float) -> None:
    labels = torch.arange(600) % 3
    drawn = relabelled(labels, error, n_classes=3, n_draws=50, seed=0)
    differs = drawn != labels
    assert float(differs.double().mean()) == pytest.approx(error, abs=0.01)
    if error:
        shift = ((drawn - labels) % 3)[differs]
        assert float((shift == 1).double().mean()) == pytest.approx(0.5, abs=0.02)


def test_rank_overlap_is_spearmans() -> None:
    ours, theirs = noise(60, seed=0).abs().double(), noise(60, seed=1).abs().double()
    found = rank_overlap(ours, theirs, torch.ones(60).double(), n_permutations=99)
    assert found.value == pytest.approx(spearmanr(ours.numpy(), theirs.numpy()).statistic)
    assert rank_overlap(ours, ours, torch.ones(60).double(), n_permutations=99).p_value == 0.01
    assert rank_overlap(ours[:2], theirs[:2], torch.ones(2).double()).n_features == 2, "too few to be ranked"


def test_overlap_by_density_alone_is_no_overlap() -> None:
    """Both methods move a feature as often as it is active; a test that forgets that finds an overlap every time."""
    rejected, naive = 0, 0
    for seed in range(200):
        density = noise(200, seed=3 * seed).abs().double()
        ours, theirs = (density * (0.2 * noise(200, seed=3 * seed + i).double()).exp() for i in (1, 2))
        rejected += rank_overlap(ours, theirs, density, n_permutations=99, seed=seed).p_value <= 0.05
        naive += rank_overlap(ours, theirs, density, stratum=200, n_permutations=99, seed=seed).p_value <= 0.05
    assert naive == 200
    assert rejected <= 0.1 * 200, "nominal .05, of 200 sets; features of a stratum are not of quite equal density"
