import math

import pytest
import torch
from torch import Tensor

from tiltmeter.weights import changes
from tiltmeter.weights.changes import changed_mask, leading_svd, mask_overlap, weight_change


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(sigma: Tensor, n: int, m: int, seed: int = 0) -> Tensor:
    left, right = (torch.linalg.qr(noise(size, len(sigma), seed=seed + size))[0] for size in (n, m))
    return (left * sigma) @ right.T


def test_equal_weights_have_changed_nothing() -> None:
    found = weight_change(noise(8, 6), noise(8, 6), k=3)
    assert (found.changed_share, found.spectral_drift, found.angle_left, found.angle_right) == (0, 0, 0, 0)
    assert math.isnan(found.stable_rank)
    assert math.isnan(found.numerical_rank)


def test_twice_the_weights_have_a_drift_of_one_and_no_angle() -> None:
    w = with_spectrum(torch.tensor([5.0, 4.0, 3.0, 2.0]).double(), 8, 6)
    found = weight_change(w, 2 * w, k=3)
    assert found.spectral_drift == pytest.approx(1)
    assert max(found.angle_left, found.angle_right) < 1e-12
    assert found.relative_norm == pytest.approx(1)


def test_a_rotation_in_a_principal_plane_is_its_angle() -> None:
    w = torch.diag(torch.tensor([5.0, 4.0, 1.0, 0.5], dtype=torch.float64))
    turn = torch.eye(4, dtype=torch.float64)
    turn[1, 1] = turn[2, 2] = math.cos(0.3)
    turn[1, 2], turn[2, 1] = -math.sin(0.3), math.sin(0.3)
    found = weight_change(w, turn @ w, k=2)
    assert found.angle_left == pytest.approx(0.3, abs=1e-12)
    assert found.spectral_drift < 1e-12
    assert weight_change(w, w @ turn, k=2).angle_right == pytest.approx(0.3, abs=1e-12)


def test_ranks_and_energies_are_those_of_the_update() -> None:
    delta = with_spectrum(torch.tensor([2.0, 1.0]).double(), 30, 20)
    w = noise(30, 20, seed=3)
    found = weight_change(w, w + delta)
    assert found.numerical_rank == 2
    assert found.stable_rank == pytest.approx(1.25)
    assert found.energies == pytest.approx((0.8, 1.0, 1.0, 1.0))
    assert leading_svd(delta, 4).truncated(2).sub(delta).abs().max() < 1e-12
    cut = delta - leading_svd(delta, 4).truncated(1)
    assert float(cut.norm()) == pytest.approx(1.0)


def test_changes_below_the_rounding_of_bfloat16_are_none() -> None:
    w = torch.ones(10, 10)
    assert changed_mask(w, w * (1 + 1e-4)).sum() == 0
    moved = w.clone()
    moved[:3] *= 1.02
    assert float(changed_mask(w, moved).float().mean()) == pytest.approx(0.3)
    assert float(changed_mask(w, w * (1 + 1e-4), torch.float32).float().mean()) == 1


def test_masks_overlap_by_chance_and_more() -> None:
    one, other = (noise(400, 400, seed=s) > 1.0 for s in (0, 1))
    found = mask_overlap(one, other)
    assert found.overlap == pytest.approx(found.chance, abs=0.01)
    assert mask_overlap(one, one).overlap == 1
    assert math.isnan(mask_overlap(one, torch.zeros_like(one)).overlap)
    with pytest.raises(ValueError, match="one shape"):
        changed_mask(noise(2, 3), noise(3, 2))


def test_lanczos_gives_what_the_whole_decomposition_does(monkeypatch: pytest.MonkeyPatch) -> None:
    w = noise(150, 120) + with_spectrum(torch.linspace(40, 20, 8).double(), 150, 120)
    policy = w + 0.02 * noise(150, 120, seed=9) + with_spectrum(torch.tensor([3.0]).double(), 150, 120, seed=77)
    exact, exact_svd = weight_change(w, policy, k=6), leading_svd(policy - w, 6)
    monkeypatch.setattr(changes, "EXACT_UP_TO", 64)
    found, by_lanczos = weight_change(w, policy, k=6), leading_svd(policy - w, 6)
    assert by_lanczos.sigma.tolist() == pytest.approx(exact_svd.sigma.tolist(), rel=1e-5)
    assert by_lanczos.truncated(1).double().sub(exact_svd.truncated(1)).norm() < 1e-3 * exact_svd.sigma[0]
    assert found.energies == pytest.approx(exact.energies, rel=1e-4)
    assert found.stable_rank == pytest.approx(exact.stable_rank, rel=1e-5)
    assert found.angle_left == pytest.approx(exact.angle_left, rel=1e-2)
    assert math.isnan(found.numerical_rank)  # more than the 16 that were computed
    drift = [leading_svd(x, 6).sigma for x in (w, policy)]
    assert found.spectral_drift == pytest.approx(float((drift[1] - drift[0]).norm() / drift[0].norm()), rel=1e-3)
