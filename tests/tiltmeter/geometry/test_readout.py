"""Readouts against scikit-learn and by hand; worlds in which a label is kept, moved, turned round and erased."""

import numpy as np
import pytest
import torch
from scipy.special import stdtrit
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from tiltmeter.geometry.readout import (
    APPLIED,
    CHANGED,
    UNCHANGED,
    Readout,
    quality_of_scores,
    readout,
    readout_aucs,
    weighted_auc,
)

N, WIDTH = 240, 12
LABELS = torch.arange(N) % 2 == 0
GROUPS = [str(i // 2) for i in range(N)]
AXIS = torch.nn.functional.normalize(torch.arange(1.0, WIDTH + 1, dtype=torch.float64), dim=0)


def states(separation: float = 3.0) -> torch.Tensor:
    """Noise, and along one axis the label."""
    noise = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise + separation * (LABELS.double() - 0.5)[:, None] * AXIS


def read(policy: torch.Tensor) -> Readout:
    return readout(states(), policy, LABELS, GROUPS, n_permutations=3)


def test_auc_is_that_of_scikit_learn_with_ties_and_weights() -> None:
    draw = np.random.default_rng(0)
    scores, labels, weights = draw.integers(0, 9, 60) / 4, draw.random(60) < 0.4, draw.random((3, 60))
    found = weighted_auc(torch.tensor(scores), torch.tensor(labels), torch.tensor(weights))
    expected = [roc_auc_score(labels, scores, sample_weight=row) for row in weights]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_quality_has_accuracies_of_scikit_learn_and_the_jackknife_written_out() -> None:
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(4, 40, generator=draw, dtype=torch.float64) + LABELS[:40].double()
    groups = [str(i // 4) for i in range(40)]
    found = quality_of_scores(scores, LABELS[:40], groups)
    for row, applied in zip(scores, APPLIED, strict=True):
        assert found.auc[applied].value == pytest.approx(roc_auc_score(LABELS[:40], row))
        assert found.accuracy[applied].value == pytest.approx(balanced_accuracy_score(LABELS[:40], row > 0))
    without = []
    for group in range(10):
        kept = [i for i in range(40) if i // 4 != group]
        without.append(roc_auc_score(LABELS[kept], scores[3][kept]) - roc_auc_score(LABELS[kept], scores[0][kept]))
    reach = stdtrit(9, 0.975) * np.sqrt(9 / 10 * np.square(np.array(without) - np.mean(without)).sum())
    difference = found.difference["retrained"]
    assert difference.high - difference.value == pytest.approx(reach)


def test_states_that_did_not_change_are_read_the_same() -> None:
    found = read(states())
    assert found.quality.auc["base"] == found.quality.auc["policy"] == found.quality.auc["retrained"]
    assert [found.cosine, found.cosine_by_means] == pytest.approx([1, 1])
    assert set(found.quality.verdict.values()) == {UNCHANGED}
    assert found.cosine_of_halves > 0.8
    assert found.p_value == 0.25, "one in four, the least that three permutations allow"


def test_shift_along_the_label_moves_the_threshold_and_no_rank() -> None:
    found = read(states() + 5 * AXIS).quality
    assert found.verdict["policy"] == found.verdict["retrained"] == UNCHANGED
    assert found.accuracy["policy"].value < 0.6 < 0.85 < found.accuracy["policy_less_shift"].value
    assert found.accuracy["policy_less_shift"].value == pytest.approx(found.accuracy["base"].value)


def test_label_that_turned_round_is_known_and_read_the_other_way() -> None:
    base = states()
    found = read(base - 2 * (base @ AXIS)[:, None] * AXIS)
    for quality in (found.quality, found.by_means):
        assert quality.verdict["policy"] == CHANGED
        assert quality.auc["policy"].value < 0.1
        assert quality.verdict["retrained"] == UNCHANGED
    assert found.cosine < -0.8
    assert found.cosine_by_means < -0.8


def test_label_that_was_erased_is_not_known_any_more() -> None:
    base = states()
    found = read(base - (base @ AXIS)[:, None] * AXIS).quality
    assert found.verdict["retrained"] == found.verdict["policy"] == CHANGED
    assert found.auc["retrained"].value < 0.65


def test_label_that_is_not_there_is_not_better_than_permuted_ones() -> None:
    found = readout(states(0.0), states(0.0), LABELS, GROUPS, n_permutations=9)
    assert found.null.low < found.quality.auc["base"].value < 0.62
    assert found.p_value > 0.1


def test_readouts_do_not_see_the_groups_that_they_are_tested_on() -> None:
    rows = torch.randn(N // 2, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    twins = rows.repeat_interleave(2, dim=0)
    labels = (torch.rand(N // 2, generator=torch.Generator().manual_seed(3)) < 0.5).repeat_interleave(2)
    assert readout(twins, twins, labels, GROUPS, n_permutations=1).quality.auc["base"].value < 0.65


@pytest.mark.parametrize(
    ("kept", "labels", "groups", "said"),
    [
        (20, LABELS[:20], GROUPS[:20], "at least 30 texts, got 20"),
        (40, torch.ones(40, dtype=torch.bool), GROUPS[:40], "each label in at least 5 groups, got 0"),
        (40, LABELS[:40], ["a"] * 40, "each label in at least 5 groups, got 1"),
    ],
)
def test_too_few_texts_labels_or_groups_are_refused(
    kept: int, labels: torch.Tensor, groups: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        readout(states()[:kept], states()[:kept], labels, groups)


def test_states_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite states"):
        read(states().fill_(torch.nan))


def test_aucs_alone_are_those_of_the_whole_readout() -> None:
    policy = states(1.0).flip(1)
    for seed in (0, 1):
        whole = readout(states(), policy, LABELS, GROUPS, n_permutations=1, seed=seed).quality.auc
        alone = readout_aucs(states(), policy, LABELS, GROUPS, seed=seed)
        assert alone == {applied: interval.value for applied, interval in whole.items()}
    assert len({round(auc, 6) for auc in alone.values()}) > 2
    with pytest.raises(ValueError, match="at least 30 texts, got 20"):
        readout_aucs(states()[:20], states()[:20], LABELS[:20], GROUPS[:20])
