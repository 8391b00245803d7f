"""How often is a set of features whose members were chosen blindly called above sets that are used as much?"""

import pytest
import torch

from tiltmeter.sparse.feature_sets import matched_in_usage
from tiltmeter.stats.among_random import ABOVE, BELOW, among_random
from tiltmeter.stats.jackknife import without_each

pytestmark = pytest.mark.slow
N_FEATURES, N_PROMPTS, N_DRAWS = 200, 32, 39


def verdicts(n_sets: int, *, share: float, gain: float = 0.0) -> list[str]:
    """Verdicts on random sets: the loss rises by each feature's usage times a number of its own, ``gain`` more for members."""
    weights = without_each([str(i) for i in range(N_PROMPTS)])
    of_prompts, found = weights.sum(1), []
    for seed in range(n_sets):
        draw = torch.Generator().manual_seed(seed)
        usage = (1.5 * torch.randn(N_FEATURES, generator=draw, dtype=torch.float64)).exp()
        members = torch.zeros(N_FEATURES, dtype=torch.bool)
        members[torch.randperm(N_FEATURES, generator=draw)[: round(share * N_FEATURES)]] = True
        each = 1 + 0.5 * torch.randn(N_FEATURES, 1, generator=draw, dtype=torch.float64) + gain * members[:, None]
        noise = 1 + 0.3 * torch.randn(N_FEATURES, N_PROMPTS, generator=draw, dtype=torch.float64)
        rises = usage[:, None] * each * noise
        drawn = matched_in_usage(usage, float(usage[members].sum()), n_draws=N_DRAWS, seed=seed)
        own, random = rises[members].sum(0), drawn.double() @ rises
        found.append(among_random(weights @ own / of_prompts, (weights @ random.T) / of_prompts[:, None]).verdict)
    return found


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_blindly_chosen_sets_are_rarely_above_or_below(share: float) -> None:
    said = verdicts(200, share=share)
    assert said.count(ABOVE) <= 0.06 * 200, "nominal 2.5 %, of 200 sets: standard error 1.1 %"
    assert said.count(BELOW) <= 0.06 * 200


def test_sets_whose_features_do_twice_as_much_are_above() -> None:
    assert verdicts(50, share=0.2, gain=1.0).count(ABOVE) >= 45
