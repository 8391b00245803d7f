import math

import numpy as np
import pytest
import torch

from analysis.figures.fig1c_clouds import cloud_distances, cloud_plane
from tests.analysis.planted_geometry import POINT, noise, one_site
from tiltmeter.geometry.rows import in_own_span


@pytest.mark.parametrize(("noise_size", "least", "most"), [(0.0, -1e-9, 1e-9), (0.3, -0.02, 0.2)])
def test_a_constant_shift_leaves_nothing_between_the_clouds(noise_size: float, least: float, most: float) -> None:
    base = noise(40, 10)
    fit = cloud_distances(one_site(base, base + 1 + noise_size * noise(40, 10, 1)), POINT, n_random=20)
    assert least <= fit["distance_left"] <= most
    assert fit["distance_left_random_low"] > 0.7
    assert fit["left_per_pair_median"] == pytest.approx(0.3 if noise_size else 0, abs=0.05)
    assert fit["shift_share"] == pytest.approx(1 / (1 + noise_size**2), abs=0.03)


def test_a_change_of_scale_is_no_shift() -> None:
    base = noise(60, 5)
    fit = cloud_distances(one_site(base, 3 * base), POINT, n_random=0)
    assert fit["distance_left_low"] <= 1.3
    assert fit["distance_left"] > 0.7
    assert fit["shift_share"] < 0.1
    assert all(math.isnan(fit[f"distance_left_random{end}"]) for end in ("", "_low", "_high"))


def test_v_is_never_taken_from_the_cloud_it_is_tried_on() -> None:
    """Changes of one scale without a common shift: v* of the same rows would bring the means together, that of others can't."""
    left = []
    for seed in range(10):
        base = noise(16, 60, seed)
        rows = one_site(base, base + 2 * noise(16, 60, 100 + seed))
        left.append(cloud_distances(rows, POINT, n_random=0)["distance_left"])
    assert float(np.mean(left)) > 1


def test_a_wide_model_is_measured_as_in_all_its_dimensions() -> None:
    """Rows are taken to their own span first; here in more dimensions than rows, beside the same rows padded with zeros."""
    base, update = noise(12, 6), noise(12, 6, 1) + 1
    wide = [torch.cat([x, torch.zeros(12, 40, dtype=torch.float64)], 1) for x in (base, base + update)]
    narrow = cloud_distances(one_site(base, base + update), POINT, n_random=0)
    found = cloud_distances(one_site(*wide), POINT, n_random=0)
    assert found["distance_left"] == pytest.approx(narrow["distance_left"], abs=1e-9)
    assert found["energy_distance_base"] == pytest.approx(narrow["energy_distance_base"], abs=1e-9)
    assert torch.allclose(in_own_span(wide[0]) @ in_own_span(wide[0]).T, base @ base.T)


def test_clouds_are_translates_and_the_plane_is_that_of_both_models() -> None:
    base = noise(30, 6)
    rows = one_site(base, base + 2 + 0.1 * noise(30, 6, 1))
    table = cloud_plane(rows, POINT)[0].pivot(index="pair_id", columns="cloud", values=["pc1", "pc2"])
    for axis in ("pc1", "pc2"):
        at = table[axis]
        assert np.ptp(at["base_plus"] - at["base"]) == pytest.approx(0, abs=1e-9)
        assert np.allclose(at["base_plus"] + at["base_minus"], 2 * at["base"])
        assert float((at["base"] + at["policy"]).mean()) == pytest.approx(0, abs=1e-9)
        assert float(at["base_plus"].mean()) == pytest.approx(float(at["policy"].mean()), abs=1e-9)
