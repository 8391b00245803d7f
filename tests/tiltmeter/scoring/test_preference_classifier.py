"""The preference probe: finds what is planted, finds nothing in noise, and never sees a prompt on both sides."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiltmeter.geometry.consistency import cosine
from tiltmeter.scoring import preference_classifier as module
from tiltmeter.scoring.preference_classifier import classifier_direction, classifier_figures, preference_classifier


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prompts(n: int, pairs_each: int = 2) -> list[str]:
    return [f"p{i // pairs_each}" for i in range(n)]


def test_a_planted_direction_is_found_and_the_null_stays_at_chance() -> None:
    rows = noise(300, 24)
    rows[:, 5] = 1.0 + 0.3 * rows[:, 5]
    found = preference_classifier(rows, prompts(300))
    assert found.accuracy.value > 0.98
    assert found.hits.count(True) == round(300 * found.accuracy.value)
    assert found.null.low < 0.5 < found.null.high
    assert abs(found.null.value - 0.5) < 0.03
    assert found.p_value == 1 / 51


def test_a_weak_direction_is_found_as_well_as_it_can_be() -> None:
    rows = noise(2000, 4)
    rows[:, 0] += 0.8
    best = 0.5 * (1 + math.erf(0.8 / math.sqrt(2)))  # Φ(0.8), of the direction itself
    assert preference_classifier(rows, prompts(2000), n_flips=1).accuracy.value == pytest.approx(best, abs=0.03)


def test_noise_gives_chance_in_the_mean_and_its_interval_mostly_holds_it() -> None:
    found = [preference_classifier(noise(120, 30, seed), prompts(120), n_flips=10) for seed in range(20)]
    assert abs(np.mean([one.accuracy.value for one in found]) - 0.5) < 0.03
    assert sum(one.accuracy.low <= 0.5 <= one.accuracy.high for one in found) >= 16
    assert sum(one.p_value <= 0.1 for one in found) <= 6


def test_more_dimensions_than_pairs_and_wild_scales_are_no_matter() -> None:
    rows = noise(100, 400) * torch.logspace(-3, 4, 400, dtype=torch.float64)
    assert 0.3 < preference_classifier(rows, prompts(100), n_flips=1).accuracy.value < 0.7
    rows[:, 7] = 1e-3 * (1 + 0.1 * rows[:, 7] / rows[:, 7].std())
    rows[:, 8] = 0.0
    first = preference_classifier(rows, prompts(100), n_flips=1)
    assert first.accuracy.value > 0.75, "a thousandth of the largest scale, and yet separable"
    scaled = preference_classifier(rows * 1e3, prompts(100), n_flips=1)
    assert scaled.hits == first.hits


def test_a_prompt_is_never_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pairs of a prompt are the same random row: a leak would be learned by heart, 400 dimensions for 100 prompts."""
    rows = noise(100, 400).repeat_interleave(2, 0)
    honest = preference_classifier(rows, prompts(200), n_flips=1).accuracy.value
    assert abs(honest - 0.5) < 0.15
    leaking = preference_classifier(rows, list(map(str, range(200))), n_flips=1).accuracy.value
    assert leaking > 0.7, "what the groups prevent"
    seen = []
    monkeypatch.setattr(
        module, "_out_of_fold", lambda rows, splits, rng: seen.extend(splits) or np.ones(len(rows), dtype=bool)
    )
    groups = prompts(200, 3)
    preference_classifier(rows, groups, n_flips=1)
    for train, test in seen:
        assert not {groups[i] for i in train} & {groups[i] for i in test}
    assert sorted(i for _, test in seen[:5] for i in test) == list(range(200))


def test_swapping_chosen_and_rejected_everywhere_changes_nothing() -> None:
    rows = noise(90, 5) + 0.2
    assert preference_classifier(-rows, prompts(90), n_flips=1).accuracy.value == pytest.approx(
        preference_classifier(rows, prompts(90), n_flips=1).accuracy.value, abs=1e-12
    )


def test_figures_come_with_their_null_and_count_what_is_missing() -> None:
    chosen, rejected = noise(100, 8, 1) + 1, noise(100, 8, 2)
    chosen[3, 2] = math.nan
    accuracy, null = classifier_figures(
        chosen.float(), rejected.float(), prompts(100), of="base", where="layer_01 response_last"
    )
    assert (accuracy.name, null.name) == ("preference_probe_accuracy", "preference_probe_null")
    assert accuracy.value > 0.9
    assert accuracy.low <= accuracy.value <= accuracy.high
    assert null.low < 0.5 < null.high
    assert (accuracy.n, accuracy.n_missing, accuracy.of, null.of) == (99, 1, "base", "base")
    assert accuracy.scorer == "logistic probe at layer_01 response_last, 5 folds by prompt, C = 1"
    assert null.scorer.endswith("labels flipped 50 times")
    chosen[:10] = math.nan
    assert math.isnan(classifier_figures(chosen, rejected, prompts(100), of="policy", where="x")[0].value)
    few = classifier_figures(chosen[10:], rejected[10:], prompts(90, 30), of="policy", where="x")
    assert [(math.isnan(figure.value), figure.n) for figure in few] == [(True, 90)] * 2


@pytest.mark.parametrize(
    ("rows", "groups", "words"),
    [
        (noise(10, 2), ["a"] * 9, "expected 10 finite rows and as many groups, got 9"),
        (noise(10, 2) * math.nan, prompts(10), "finite rows"),
        (noise(8, 2), prompts(8), "at least 5 prompts, got 4"),
    ],
)
def test_what_cannot_be_probed_is_refused(rows: Any, groups: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        preference_classifier(rows, groups)


def test_the_direction_is_that_of_the_log_odds_whatever_the_scale_of_a_dimension() -> None:
    """Rows of a logistic model: its own weights are the answer, in log-odds per unit of activation."""
    scales = torch.tensor([1.0, 100.0, 0.01, 1.0], dtype=torch.float64)
    weights = torch.tensor([1.0, -0.8, 0.5, 0.0], dtype=torch.float64) / scales
    rows = noise(20_000, 4) * scales
    chosen = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) < torch.sigmoid(rows @ weights)
    found = classifier_direction(torch.where(chosen, 1.0, -1.0)[:, None] * rows)
    assert (found * scales).tolist() == pytest.approx((weights * scales).tolist(), abs=0.06)


def test_the_direction_minimises_the_penalised_loss_that_is_documented() -> None:
    rows = noise(60, 3) * torch.tensor([1.0, 5.0, 0.2]) + torch.tensor([0.5, 0.0, 0.1])
    found = classifier_direction(rows)
    scale = (rows.square().mean(0) * 3).sqrt()
    w = (found * scale).requires_grad_()
    (0.5 * w.square().sum() + torch.nn.functional.softplus(-(rows / scale) @ w).sum()).backward()
    assert w.grad is not None
    assert float(w.grad.norm()) < 1e-2
    assert float(cosine(classifier_direction(rows, seed=5), found)) == pytest.approx(1, abs=1e-6)


def test_the_direction_needs_finite_rows_and_ignores_dimensions_that_never_differ() -> None:
    rows = noise(40, 3)
    rows[:, 1] = 0
    assert float(classifier_direction(rows)[1]) == 0
    with pytest.raises(ValueError, match="at least two rows, all finite, got 1"):
        classifier_direction(noise(1, 3))
    rows[2, 2] = math.inf
    with pytest.raises(ValueError, match="all finite, got 40"):
        classifier_direction(rows)
