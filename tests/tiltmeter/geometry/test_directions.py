import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.tiny_models import VOCAB, random_pairs
from tiltmeter.errors import UserError
from tiltmeter.geometry.consistency import cosine
from tiltmeter.geometry.directions import (
    difference_of_means,
    mean_unembedding,
    principal_directions,
    sequence_preference_vectors,
    steering_vector,
    token_preference_vectors,
    update_directions,
)
from tiltmeter.geometry.spectra import singular_values
from tiltmeter.models.layers import Unembedding
from tiltmeter.pairs.batch import TokenizedPair, collate_pairs
from tiltmeter.states.positions import divergence


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HEAD = Unembedding(noise(VOCAB, 8))


def test_token_vector_is_the_gradient_of_the_log_odds() -> None:
    hidden = noise(1, 8, 1)[0].requires_grad_()
    logps = (HEAD.weight @ hidden).log_softmax(0)
    (gradient,) = torch.autograd.grad(logps[5] - logps[9], hidden)
    assert_close(token_preference_vectors(HEAD, torch.tensor([5]), torch.tensor([9]))[0], gradient)


def test_sequence_vector_is_the_difference_of_the_responses_mean_rows() -> None:
    pairs = random_pairs(5)
    for layout in ("shared_prefix", "concatenated"):
        batch = collate_pairs(pairs, pair_index=range(5), layout=layout)
        found = sequence_preference_vectors(HEAD, batch)
        for pair, v in zip(pairs, found, strict=True):
            w, y_l = (HEAD.weight[list(ids)].mean(0) for ids in (pair.chosen_ids, pair.rejected_ids))
            assert_close(v, w - y_l)


def test_one_token_responses_have_equal_token_and_sequence_vectors() -> None:
    batch = collate_pairs([TokenizedPair([3], [7], [8]), TokenizedPair([4], [9], [5])], pair_index=[0, 1])
    found = divergence(batch)
    v = token_preference_vectors(HEAD, found.chosen_ids, found.rejected_ids)
    assert_close(v, sequence_preference_vectors(HEAD, batch))


def test_many_tokens_and_half_precision_are_summed_in_float32() -> None:
    ids = torch.arange(10_000) % VOCAB
    half = Unembedding(HEAD.weight.to(torch.bfloat16))
    mean = mean_unembedding(half, ids, torch.zeros_like(ids), 2)
    assert mean.dtype == torch.float32
    assert_close(mean[0], half.weight.float()[ids].mean(0), rtol=1e-4, atol=1e-4)
    assert mean[1].isnan().all()


def test_steering_vector_is_the_mean_update() -> None:
    base, policy = noise(6, 4), noise(6, 4, 1)
    expected = sum(policy[i] - base[i] for i in range(6)) / 6
    assert_close(steering_vector(base, policy), expected)
    assert_close(difference_of_means(policy, base), expected)
    assert difference_of_means(policy.half(), base[:2].half()).dtype == torch.float64


@pytest.mark.parametrize("centred", [False, True])
def test_principal_directions_are_those_of_the_covariance(centred: bool) -> None:
    rows = noise(40, 6) * torch.tensor([5.0, 3, 2, 1, 1, 1]) + 10 * torch.eye(6)[3]
    found = principal_directions(rows, 3, centred=centred)
    matrix = rows - rows.mean(0) if centred else rows
    eigenvalues, vectors = torch.linalg.eigh(matrix.T @ matrix)
    for i in range(3):
        assert abs(float(cosine(found.directions[i], vectors[:, -1 - i]))) == pytest.approx(1)
    assert_close(found.energy_shares, eigenvalues.flip(0)[:3] / eigenvalues.sum())
    assert_close(found.energy_shares, (singular_values(matrix).square() / matrix.square().sum())[:3])
    assert_close(found.directions @ found.directions.T, torch.eye(3, dtype=torch.float64))
    if not centred:
        assert float(cosine(found.directions[0], rows.mean(0))) > 0.9, "it points to the side of the mean"


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_top_singular_vectors_of_the_update_point_to_the_side_of_the_mean_update(centred: bool, sign: float) -> None:
    base, shift = noise(50, 6), sign * torch.tensor([2.0, 1, 0, 0, 0, 0])
    policy = base + shift + noise(50, 6, 1) * torch.tensor([1.0, 3, 1, 1, 1, 1])
    found = update_directions(base, policy, 4, centred=centred)
    v = steering_vector(base, policy)
    assert (found.directions @ v >= 0).all()
    updates = policy - base - (v if centred else 0)
    assert_close((updates @ found.directions.T).norm(dim=0), singular_values(updates)[:4])
    assert_close(found.directions @ found.directions.T, torch.eye(4, dtype=torch.float64))
    flipped = update_directions(policy, base, 4, centred=centred)
    assert_close(flipped.directions, -found.directions, rtol=0, atol=1e-9)


def test_updates_that_are_one_shift_have_it_as_their_only_direction() -> None:
    base, v = noise(20, 6), noise(1, 6, 1)
    found = update_directions(base.float(), (base + v).float(), 2, centred=False)
    assert_close(found.directions[0], v[0] / v.norm(), rtol=0, atol=1e-6)
    assert_close(found.energy_shares, torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-9)


def test_directions_of_unfit_input_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to 3 directions, got 4"):
        principal_directions(noise(3, 8), 4, centred=True)
    with pytest.raises(UserError, match="v̄ needs chosen and rejected"):
        sequence_preference_vectors(HEAD, collate_pairs(random_pairs(2), pair_index=[0, 1], layout="chosen_only"))
