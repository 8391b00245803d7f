"""Models of the update: each wins where it is planted, none where there is nothing, and sums are as good as rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor

from tiltmeter.geometry.update_models import RIDGES, ModelScore, UpdateModels

N, D = 600, 6
PROMPTS = [f"p{i // 2}" for i in range(N)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


H, V = noise(N, D) * torch.tensor([1.0, 9, 1, 0.1, 1, 1]) + 3, noise(D, seed=1)


def fitted(updates: Tensor, base: Tensor = H, pieces: int = 1, seed: int = 0) -> dict[str, ModelScore]:
    models = UpdateModels(base.shape[1], seed=seed)
    for part in torch.arange(len(base)).tensor_split(pieces):
        models.update(base[part], (base + updates)[part], [PROMPTS[i] for i in part.tolist()])
    return {score.model: score for score in models.scores(ranks=[1, 2, 4])}


def shares(found: dict[str, ModelScore]) -> dict[str, float]:
    return {name: score.r_squared for name, score in found.items()}


def test_one_constant_shift_is_explained_by_the_constant_and_by_all_that_contain_it() -> None:
    found = shares(fitted(V.expand(N, D)))
    assert list(found) == [
        *("constant", "scaled", "rank_1", "rank_2", "rank_4", "affine"),
        *("own_mean", "own_rank_1", "own_rank_2", "own_rank_4"),
    ]
    assert found == pytest.approx(dict.fromkeys(found, 1.0), abs=1e-9)


def test_an_affine_update_is_explained_by_the_affine_model_and_not_by_fewer_directions() -> None:
    found = shares(fitted((H - 3) @ noise(D, D, seed=2) + 0.2 * V))
    assert found["affine"] > 0.999
    assert found["constant"] < 0.05
    assert found["constant"] <= found["scaled"] < found["affine"]
    assert found["rank_1"] < found["rank_2"] < found["rank_4"] < found["affine"]


def test_a_direction_of_varying_length_is_explained_once_lengths_may_vary() -> None:
    """δ_i = a_i v with a affine in h: f = ā² / mean(a²), and everything else is 1."""
    lengths = 1 + (H - 3) @ noise(D, seed=3) / 5
    found = shares(fitted(lengths[:, None] * V))
    assert found["constant"] == pytest.approx(float(lengths.mean() ** 2 / lengths.square().mean()), abs=0.02)
    for name in ("scaled", "rank_1", "affine", "own_mean", "own_rank_1"):
        assert found[name] > 0.999, name


def test_length_independent_of_the_state_is_explained_by_models_given_the_update_alone() -> None:
    found = shares(fitted((1 + noise(N, 1, seed=4)) * V))
    assert found["own_mean"] > 0.999
    assert found["own_rank_1"] > 0.999
    assert found["affine"] == pytest.approx(0.5, abs=0.05)
    assert found["scaled"] == pytest.approx(found["constant"], abs=0.03)


def test_two_directions_beside_the_mean_need_rank_two() -> None:
    found = shares(fitted(V + (H - 3)[:, :2] / torch.tensor([1.0, 9]) @ noise(2, D, seed=5)))
    assert found["rank_2"] > 0.999
    assert found["rank_1"] < 0.98
    assert found["own_rank_2"] < 0.999, "the mean is a third"
    assert found["own_rank_4"] > 0.999


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_explained_by_nothing_that_has_to_predict_it(seed: int) -> None:
    found = shares(fitted(noise(N, D, seed=10 + seed), seed=seed))
    for name in ("constant", "scaled", "rank_1", "rank_2", "rank_4", "affine"):
        assert -0.1 < found[name] <= 0, name
    assert found["own_rank_1"] == pytest.approx(1 / D, abs=0.05), "knowing the answer, k of d dimensions are free"


def test_scores_are_those_of_explicit_rows_and_of_another_ridge() -> None:
    updates = (H - 3) @ noise(D, D, seed=2) / 5 + V + noise(N, D, seed=6)
    models = UpdateModels(D)
    models.update(H, H + updates, PROMPTS)
    found = {score.model: score for score in models.scores()}
    folds = torch.tensor([models._fold_of(prompt) for prompt in PROMPTS])
    lost = {"constant": 0.0, "affine": 0.0}
    for fold in range(5):
        train, test = folds != fold, folds == fold
        mean, scale = H[train].mean(0), H[train].std(0, correction=0)
        ridge = found["affine"].ridge[fold]
        sklearn = Ridge(alpha=ridge * int(train.sum())).fit((H[train] - mean) / scale, updates[train])
        predicted = torch.from_numpy(sklearn.predict((H[test] - mean) / scale))
        lost["affine"] += float((updates[test] - predicted).square().sum())
        lost["constant"] += float((updates[test] - updates[train].mean(0)).square().sum())
    for name, value in lost.items():
        assert found[name].r_squared == pytest.approx(1 - value / float(updates.square().sum()), abs=1e-9), name
    assert set(found["affine"].ridge) <= set(RIDGES)
    assert found["constant"].ridge == []
    assert len(found["affine"].by_fold) == 5
    assert min(found["affine"].by_fold) <= found["affine"].r_squared <= max(found["affine"].by_fold)


@settings(max_examples=5)
@given(st.integers(1, 9), st.integers(0, 99))
def test_scores_do_not_depend_on_how_rows_are_cut_into_batches(pieces: int, seed: int) -> None:
    updates = noise(N, D, seed=seed) + H / 5
    expected = shares(fitted(updates))
    assert shares(fitted(updates, pieces=pieces)) == pytest.approx(expected, abs=1e-9)


def test_a_large_mean_state_costs_no_digits() -> None:
    updates = (H - 3) @ noise(D, D, seed=2) / 5 + V
    near, far = shares(fitted(updates)), shares(fitted(updates, base=H + 1e6))
    assert far == pytest.approx(near, abs=1e-6)


def test_affine_model_does_not_overfit_fewer_rows_than_dimensions() -> None:
    base = noise(60, 100)
    models = UpdateModels(100)
    models.update(base, base + noise(100, seed=1) + 0.1 * noise(60, 100, seed=2), [str(i) for i in range(60)])
    found = {score.model: score.r_squared for score in models.scores()}
    assert found["constant"] > 0.97
    assert found["affine"] == pytest.approx(found["constant"], abs=0.01), "the penalty keeps it from fitting noise"


def test_pairs_of_a_prompt_are_never_on_both_sides() -> None:
    """Both rows of a prompt are one random update and one random state: a leak would be learned by heart."""
    base, updates = noise(40, 60).repeat_interleave(2, 0), noise(40, 60, seed=1).repeat_interleave(2, 0)
    for names, leaks in (([f"p{i // 2}" for i in range(80)], False), ([str(i) for i in range(80)], True)):
        models = UpdateModels(60)
        models.update(base, base + updates, names)
        affine = next(score.r_squared for score in models.scores() if score.model == "affine")
        assert (affine > 0.3) == leaks


def test_updates_of_zero_have_no_score() -> None:
    assert all(math.isnan(x) for x in shares(fitted(torch.zeros(N, D))).values())


def test_update_models_of_unfit_input_are_refused() -> None:
    models = UpdateModels(D)
    with pytest.raises(ValueError, match="at least 3 folds, got 0: too few prompts"):
        models.scores()
    models.update(H[:4], H[:4], ["one prompt"] * 4)
    with pytest.raises(ValueError, match="got 1: too few prompts"):
        models.scores()
    with pytest.raises(ValueError, match="rows of one number, got 4, 4, 3"):
        models.update(H[:4], H[:4], list("abc"))
    with pytest.raises(ValueError, match="expected finite rows"):
        models.update(H[:1], torch.full((1, D), math.nan), ["a"])
    with pytest.raises(ValueError, match="at least 3 folds, got 2"):
        UpdateModels(D, n_folds=2)
