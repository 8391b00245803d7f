import math

import pytest
import torch
from scipy.linalg import orthogonal_procrustes, subspace_angles
from scipy.stats import spearmanr
from torch import Tensor

from tiltmeter.geometry import similarity
from tiltmeter.geometry.similarity import (
    cka_interval,
    cka_map,
    displacement,
    gram,
    hsic_unbiased,
    linear_cka,
    mutual_knn,
    one_row_a_prompt,
    principal_angles,
    procrustes,
    rsa,
    u_centred,
    without_shift,
)


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(noise(d, d, seed))[0]


def written_out_hsic(k: Tensor, g: Tensor) -> float:
    """Mean of K_ij (L_ij + L_qr − 2 L_iq) over all i, j, q, r that differ."""
    n, total, count = len(k), 0.0, 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += float(k[i, j] * (g[i, j] + g[q, r] - 2 * g[i, q]))
                        count += 1
    return total / count


def test_hsic_is_the_u_statistic_written_out() -> None:
    k, g = gram(noise(7, 3)), gram(noise(7, 5, 1), centred=False)
    assert hsic_unbiased(k, g) == pytest.approx(written_out_hsic(k, g), rel=1e-12)
    assert float((u_centred(k) * u_centred(g)).sum()) / (7 * 4) == pytest.approx(hsic_unbiased(k, g), rel=1e-12)


@pytest.mark.parametrize("debiased", [True, False])
def test_cka_of_a_rotated_scaled_and_shifted_cloud_is_one(debiased: bool) -> None:
    x = noise(30, 12)
    assert linear_cka(x, -3 * x @ rotation(12) + 100, debiased=debiased) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, torch.cat([x, torch.zeros(30, 5)], 1), debiased=debiased) == pytest.approx(1, abs=1e-12)


def test_cka_of_independent_clouds_is_zero_debiased_and_near_one_biased() -> None:
    pairs = [(noise(40, 2000, 2 * seed), noise(40, 2000, 2 * seed + 1)) for seed in range(20)]
    debiased = torch.tensor([linear_cka(*pair) for pair in pairs])
    assert abs(float(debiased.mean())) < 3 * float(debiased.std()) / math.sqrt(20)
    assert float(debiased.abs().max()) < 0.15
    assert min(linear_cka(*pair, debiased=False) for pair in pairs) > 0.95


def test_cka_without_each_prompt_is_that_of_the_other_prompts() -> None:
    x, y = noise(12, 6), noise(12, 9, 1)
    y[:, :6] += 2 * x
    found = similarity._ckas(gram(x), gram(y))
    assert float(found[0]) == pytest.approx(linear_cka(x, y), abs=1e-12)
    for i in range(12):
        kept = torch.arange(12) != i
        assert float(found[1 + i]) == pytest.approx(linear_cka(x[kept], y[kept]), abs=1e-10)
    interval = cka_interval(gram(x), gram(y))
    assert interval.low < interval.value < interval.high < 1


def test_the_map_holds_the_cka_of_every_pair() -> None:
    clouds = [noise(15, 4, seed) for seed in range(3)]
    made = cka_map([u_centred(gram(x)).float() for x in clouds], [u_centred(gram(x)).float() for x in clouds[:2]])
    for i, x in enumerate(clouds):
        for j, y in enumerate(clouds[:2]):
            assert float(made[i, j]) == pytest.approx(linear_cka(x, y), abs=1e-6)


def test_rsa_is_spearmans_and_mantel_tells_related_clouds_from_others() -> None:
    x, unrelated = noise(40, 5), noise(40, 7, 1)
    y = torch.cat([x, 0.3 * unrelated], 1)
    found = rsa(gram(x), gram(y))
    assert found.interval.value == pytest.approx(spearmanr(torch.pdist(x), torch.pdist(y)).statistic, abs=1e-12)
    assert found.p_value == 0.01
    assert found.interval.value > found.null_high
    assert found.interval.low < found.interval.value < found.interval.high
    assert rsa(gram(x), gram(7 * x @ rotation(5))).interval.value == pytest.approx(1, abs=1e-9)


def test_rsa_without_each_prompt_is_that_of_the_other_prompts() -> None:
    x = noise(40, 5)
    y = x + 0.5 * noise(40, 5, 1)
    ranks = [similarity._distance_ranks(gram(z)) for z in (x, y)]
    whole, without = similarity._spearmans(*ranks)
    kept = [torch.arange(40) != i for i in range(40)]
    exact = torch.tensor([spearmanr(torch.pdist(x[k]), torch.pdist(y[k])).statistic for k in kept])
    assert float(whole) == pytest.approx(spearmanr(torch.pdist(x), torch.pdist(y)).statistic, abs=1e-12)
    assert without.tolist() == pytest.approx(exact.tolist(), abs=1e-12)


def test_mantel_keeps_its_level() -> None:
    """p ≤ 5 % in at most 5 % of sets, chance allowed for."""
    below = sum(rsa(gram(noise(12, 4, s)), gram(noise(12, 4, 9999 + s))).p_value <= 0.05 for s in range(400))
    assert below / 400 <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / 400)
    assert below > 0


def test_neighbours_of_independent_clouds_overlap_by_chance() -> None:
    found = [mutual_knn(noise(60, 50, 2 * s), noise(60, 50, 2 * s + 1), k=5) for s in range(60)]
    assert found[0].chance == 5 / 59
    mean = sum(each.interval.value for each in found) / 60
    assert mean == pytest.approx(5 / 59, abs=0.008)
    x = noise(60, 50)
    assert mutual_knn(x, 2 * x @ rotation(50), k=5).interval.value == 1
    assert mutual_knn(x, x + 30, k=5).interval.value < 0.8  # cosines see a shift


def test_neighbours_without_each_prompt_are_those_of_the_other_prompts() -> None:
    x, y = noise(14, 5), noise(14, 5) + noise(14, 5, 1)
    found = similarity._shared_neighbours(similarity.nearest(x, 3), similarity.nearest(y, 3, gram(y)))
    assert float(found[0]) == mutual_knn(x, y, k=3).interval.value
    for i in range(14):
        kept = torch.arange(14) != i
        assert float(found[1 + i]) == pytest.approx(mutual_knn(x[kept], y[kept], k=3).interval.value, abs=1e-12)


def test_procrustes_is_that_of_scipy_and_zero_for_a_rotation() -> None:
    x, y = noise(40, 6), noise(40, 6, 1) + 5
    a, b = (z - z.mean(0) for z in (x, y))
    turned, scale = orthogonal_procrustes(a.numpy(), b.numpy())
    assert turned.shape == (6, 6)
    expected = 1 - scale**2 / float(a.square().sum() * b.square().sum())
    assert procrustes(x, y).value == pytest.approx(expected, abs=1e-12)
    for n, d in ((40, 6), (10, 90)):
        rows = noise(n, d)
        assert procrustes(rows, 3 * rows @ rotation(d) - 2).value == pytest.approx(0, abs=1e-9)


def test_angles_are_those_of_scipy_and_of_a_planted_rotation() -> None:
    for n, d in ((50, 8), (12, 60)):
        x, y = noise(n, d), noise(n, d, 1)
        first = [torch.linalg.svd(z - z.mean(0), full_matrices=False)[2][:3].T.numpy() for z in (x, y)]
        expected = sorted(subspace_angles(*first))
        assert principal_angles(x, y, k=3).tolist() == pytest.approx(expected, abs=1e-7)
    x = noise(200, 5) * torch.tensor([9.0, 5.0, 0.1, 0.1, 0.1])
    turn = torch.eye(5, dtype=torch.float64)
    turn[[0, 2], [0, 2]] = math.cos(0.3)
    turn[0, 2], turn[2, 0] = math.sin(0.3), -math.sin(0.3)
    assert principal_angles(x, x @ turn, k=2).max() == pytest.approx(0.3, abs=2e-3)
    assert principal_angles(x, 4 * x + 3, k=2).abs().max() < 1e-12


def test_a_shift_is_seen_by_displacement_alone_and_gone_without_v() -> None:
    x = noise(20, 30)
    y = x + torch.linspace(-3, 3, 30)
    assert without_shift(x, y).sub(x).abs().max() < 1e-12
    assert displacement(x, without_shift(x, y)).value == pytest.approx(0, abs=1e-20)
    spread = float((x - x.mean(0)).square().sum())
    assert displacement(x, y).value == pytest.approx(20 * float(torch.linspace(-3, 3, 30).square().sum()) / spread)
    assert linear_cka(x, y) == pytest.approx(1, abs=1e-12)


def test_rows_of_a_prompt_become_one() -> None:
    rows = torch.tensor([[2.0, 0.0], [1.0, 1.0], [4.0, 2.0]])
    assert one_row_a_prompt(rows, ["a", "b", "a"]).tolist() == [[3.0, 1.0], [1.0, 1.0]]


def test_equal_states_and_few_prompts_have_no_number() -> None:
    flat, x = torch.full((20, 4), 0.1), noise(20, 4)
    assert math.isnan(linear_cka(flat, x))
    assert math.isnan(cka_interval(gram(flat), gram(x)).value)
    assert math.isnan(rsa(gram(flat), gram(x)).interval.value)
    assert math.isnan(mutual_knn(flat, x).interval.value)
    assert math.isnan(procrustes(flat, x).value)
    assert math.isnan(displacement(flat, x).value)
    assert math.isnan(cka_interval(gram(x[:5]), gram(x[:5])).value)
    assert math.isnan(mutual_knn(x[:6], x[:6], k=5).interval.value)


def test_widths_that_differ_are_refused_where_a_measure_has_none() -> None:
    x, y = noise(20, 4), noise(20, 5)
    for measure in (procrustes, displacement, principal_angles, without_shift):
        with pytest.raises(ValueError, match=r"one shape|one width"):
            measure(x, y)  # type: ignore[operator]
    assert abs(linear_cka(x, y)) < 1
    assert 0 <= mutual_knn(x, y).interval.value <= 1
