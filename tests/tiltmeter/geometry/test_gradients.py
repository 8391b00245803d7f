import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from tests.tiny_models import ARCHITECTURES, make_model, random_pairs
from tiltmeter.geometry.gradients import (
    GradientMoments,
    log_prob_gradients,
    sequence_gradients,
    shared_state_gradient,
)
from tiltmeter.models.layers import Unembedding, unembedding
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs, sum_by_sequence, target_hidden_states, token_log_probs
from tiltmeter.states.capture import capture_gradients

BETA = 0.7


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def finite_differences(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar function, one entry at a time."""
    gradient = torch.empty_like(x)
    for i in range(x.numel()):
        shift = torch.zeros_like(x).flatten()
        shift[i] = step
        shift = shift.view_as(x)
        gradient.view(-1)[i] = (f(x + shift) - f(x - shift)) / (2 * step)
    return gradient


def test_one_shared_state_is_pushed_along_v_by_finite_differences() -> None:
    weight, h = noise(11, 5), noise(5, seed=1)
    w, y_l, reference = 3, 8, 0.4

    def margin(state: Tensor) -> Tensor:
        logps = (weight @ state).log_softmax(0)
        return logps[w] - logps[y_l] - reference

    numeric = finite_differences(lambda x: -F.logsigmoid(BETA * margin(x)), h)
    v = (weight[w] - weight[y_l])[None]
    assert_close(shared_state_gradient(margin(h)[None], v, beta=BETA)[0], numeric, rtol=0, atol=1e-9)


def loss_of_sequences(logps: Tensor, n_pairs: int) -> tuple[Tensor, Tensor]:
    margins = logps[:n_pairs] - logps[n_pairs:] - 0.3
    return -F.logsigmoid(BETA * margins).sum(), margins.detach()


def test_sequence_gradients_are_those_of_finite_differences() -> None:
    batch = collate_pairs(random_pairs(2, longest=3), pair_index=[0, 1], layout="concatenated")
    head = Unembedding(noise(64, 4))
    hidden = noise(len(batch.target_ids), 4, seed=1)

    def loss(states: Tensor) -> Tensor:
        logps = token_log_probs(states, head, batch.target_ids)
        return loss_of_sequences(sum_by_sequence(logps, batch.target_sequences, 4), 2)[0]

    logps = sum_by_sequence(token_log_probs(hidden, head, batch.target_ids), batch.target_sequences, 4)
    single = log_prob_gradients(hidden, head, batch.target_ids, chunk_tokens=3)
    closed = sequence_gradients(loss_of_sequences(logps, 2)[1], single, batch.target_sequences, beta=BETA)
    assert_close(closed, finite_differences(loss, hidden), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_closed_form_is_the_gradient_of_a_training_step(family: str) -> None:
    """Rows that predict the first token of both responses receive both sides' gradients, and only v is left."""
    model = make_model(family, attn="eager")
    batch = collate_pairs(random_pairs(3), pair_index=range(3), layout="shared_prefix")
    received: list[Tensor] = []
    with capture_gradients(model, received.append):
        loss, margins = loss_of_sequences(sequence_log_probs(model, batch), 3)
        loss.backward()
    head = unembedding(model)
    with torch.no_grad():
        hidden = target_hidden_states(model, batch)
    single = log_prob_gradients(hidden, head, batch.target_ids)
    closed = sequence_gradients(margins, single, batch.target_sequences, beta=BETA)
    gathered = torch.zeros_like(received[0]).flatten(0, 1).index_add(0, batch.target_rows, closed)
    assert_close(received[0].flatten(0, 1), gathered, rtol=1e-3, atol=1e-4)
    if head.soft_cap is None and head.scale == 1:
        first = batch.target_rows[batch.target_sequences == 0][0]
        firsts = [ids[0] for ids in (batch.target_ids[batch.target_sequences == s] for s in (0, 3))]
        v = (head.weight[firsts[0]] - head.weight[firsts[1]])[None].detach()
        expected = shared_state_gradient(margins[:1], v, beta=BETA)[0]
        assert_close(received[0].flatten(0, 1)[first], expected, rtol=1e-3, atol=1e-4)


def whole(gradients: Tensor, v: Tensor, fixed: Tensor) -> tuple[float, float, float]:
    unit = gradients / gradients.norm(dim=1, keepdim=True)
    energy = gradients.square().sum()
    per_row = ((gradients * v).sum(1) / v.norm(dim=1)).square().sum() / energy
    along = (gradients @ fixed / fixed.norm()).square().sum() / energy
    return float(unit.mean(0).norm()), float(per_row), float(along)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 5), st.integers(0, 99))
def test_streamed_gradients_equal_one_batch_and_a_merge(n: int, d: int, pieces: int, seed: int) -> None:
    g, v, fixed = noise(n, d, seed=seed), noise(n, d, seed=seed + 1), noise(d, seed=seed + 2)
    parts = [GradientMoments(d, names=["sequence", "update"]) for _ in range(pieces)]
    for part, rows, own in zip(parts, g.tensor_split(pieces), v.tensor_split(pieces), strict=True):
        part.update(rows, {"update": fixed[None], "sequence": own})
    summed = parts[0].all_reduce(lambda x: x + sum((p._sums for p in parts[1:]), torch.zeros(())))
    for part in parts[1:]:
        parts[0].merge(part)
    for found in (parts[0].summary(), summed.summary()):
        assert found.n_rows == n
        shares = found.energy_shares
        assert (found.mean_resultant, shares["sequence"], shares["update"]) == pytest.approx(whole(g, v, fixed), 1e-12)


def test_one_shared_v_gives_resultant_one_and_orthogonal_gradients_share_no_energy() -> None:
    v = noise(1, 6)
    gradients = shared_state_gradient(noise(50), v.expand(50, -1), beta=0.1)
    moments = GradientMoments(6, names=["v", "other"])
    other = noise(1, 6, seed=2)
    moments.update(gradients, {"v": -3 * v, "other": other - v * (other @ v.T) / v.square().sum()})
    found = moments.summary()
    assert found.mean_resultant == pytest.approx(1)
    assert found.energy_shares == pytest.approx({"v": 1, "other": 0})


def test_noise_points_nowhere_and_shares_one_over_d() -> None:
    moments = GradientMoments(50, names=["fixed"])
    moments.update(noise(4000, 50), {"fixed": noise(1, 50, seed=1)})
    found = moments.summary()
    assert found.mean_resultant == pytest.approx(1 / math.sqrt(4000), rel=0.3)
    assert found.energy_shares["fixed"] == pytest.approx(1 / 50, rel=0.1)


def test_rows_without_gradient_count_nowhere_and_nothing_seen_is_nan() -> None:
    moments = GradientMoments(3, names=["z"])
    assert math.isnan(moments.summary().mean_resultant)
    moments.update(torch.zeros(2, 3), {"z": torch.zeros(1, 3)})
    assert math.isnan(moments.summary().energy_shares["z"])
    moments.update(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), {"z": torch.tensor([[0.0, 1.0, 0.0]])})
    assert moments.summary() == (1, 1.0, {"z": 1.0})
    moments.update(torch.full((1, 3), torch.nan), {"z": torch.ones(1, 3)})
    assert math.isnan(moments.summary().mean_resultant)
    moments.reset()
    assert moments.summary().n_rows == 0
    with pytest.raises(ValueError, match=r"expected directions \['z'\], got \['y'\]"):
        moments.update(torch.ones(1, 3), {"y": torch.ones(1, 3)})
    with pytest.raises(ValueError, match=r"expected directions \['z'\], got \[\]"):
        moments.merge(GradientMoments(3, names=[]))
