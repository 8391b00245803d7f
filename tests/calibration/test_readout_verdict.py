"""How often two readouts are called equally good: at the margin's edge, and halfway to it."""

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from tests.calibration.coverage import monte_carlo_band
from tiltmeter.geometry.readout import CHANGED, MARGIN, UNCHANGED, balanced_accuracies, quality_of_scores

pytestmark = pytest.mark.slow
N_SETS, N_SETS_OF_POWER, AUC = 500, 200, 0.85


def verdicts(change: float, n: int, *, n_sets: int = N_SETS) -> list[str]:
    """Verdicts on policies whose AUC is lower by ``change``; scores of a text resemble one another in both models."""
    draw, groups = np.random.default_rng(0), [str(i // (n // 50)) for i in range(n)]
    labels = np.arange(n) % 2 == 0
    found = []
    for _ in range(n_sets):
        noise, own = draw.normal(0, 1, (2, n))
        base = noise + np.sqrt(2) * ndtri(AUC) * labels
        policy = 0.95 * noise + np.sqrt(1 - 0.95**2) * own + np.sqrt(2) * ndtri(AUC - change) * labels
        scores = torch.tensor(np.stack([base, policy, policy, policy]))
        found.append(quality_of_scores(scores, torch.tensor(labels), groups).verdict["policy"])
    return found


def test_readout_at_the_edge_of_the_margin_is_called_unchanged_in_5_percent() -> None:
    rate = verdicts(MARGIN, 100).count(UNCHANGED) / N_SETS
    assert rate <= monte_carlo_band(0.0, 0.05, n_sets=N_SETS)[1], rate


def test_readout_halfway_to_the_margin_is_called_unchanged_in_90_percent() -> None:
    found = verdicts(MARGIN / 2, 400, n_sets=N_SETS_OF_POWER)
    rate = found.count(UNCHANGED) / N_SETS_OF_POWER
    assert rate >= 0.9, rate


def test_readout_that_is_the_same_is_called_changed_in_5_percent() -> None:
    rate = verdicts(0.0, 100).count(CHANGED) / N_SETS
    assert rate <= monte_carlo_band(0.0, 0.05, n_sets=N_SETS)[1], rate


@pytest.mark.parametrize("accuracies", [(0.99, 0.97), (0.9, 0.6)])
@pytest.mark.parametrize("n", [60, 400])
def test_interval_of_a_balanced_accuracy_holds_it(accuracies: tuple[float, float], n: int) -> None:
    """A quarter of the texts has the label, two texts a prompt; near 1 the interval stays inside 0 … 1 and is no wider than it."""
    draw, labels = np.random.default_rng(0), torch.arange(n) % 4 == 0
    groups, truth, held = [str(i // 2) for i in range(n)], sum(accuracies) / 2, 0
    odds = torch.where(labels, *accuracies)
    for _ in range(N_SETS):
        right = torch.from_numpy(draw.random(n)) < odds
        scores = torch.where(right == labels, 1.0, -1.0)[None].double()
        (found,) = balanced_accuracies(scores, labels, groups)
        held += found.low <= truth <= found.high
        assert 0 <= found.low <= found.value <= found.high <= 1
    assert held / N_SETS >= monte_carlo_band(0.95, 1.0, n_sets=N_SETS)[0], held / N_SETS
