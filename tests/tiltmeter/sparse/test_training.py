"""Training of TopK autoencoders: the loss by hand, its gradient, dead features revived, and a planted dictionary found again."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.tiltmeter.sparse.dictionaries import noise
from tiltmeter.errors import NumericalStop, UserError
from tiltmeter.sparse.autoencoder import SaeId, TopK
from tiltmeter.sparse.dictionary_metrics import activation_f1, match_dictionary
from tiltmeter.sparse.training import Learner, ShuffleBuffer, drop_radial_gradient, initialise, sae_loss

HERE = SaeId("layer_00")


def small(*, width: int = 12, d_model: int = 5, k: int = 2, dtype: torch.dtype = torch.float64) -> TopK:
    sae = TopK(HERE, d_model, width, k=k, subtracts_bias=True).to(dtype)
    initialise(sae, noise(9, d_model, dtype=dtype), seed=3)
    return sae


def test_loss_by_hand() -> None:
    sae, rows = small(), noise(6, 5, seed=1, dtype=torch.float64)
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[2, 5, 7]] = True
    found = sae_loss(sae, rows, dead, n_revived=2, auxiliary_weight=0.5)
    e, d, b = sae.encoder_weight.detach(), sae.decoder_weight.detach(), sae.decoder_bias.detach()
    unexplained = revived = total = lacking = 0.0
    for row in rows:
        pre = e @ (row - b)
        error = row - b
        for j in pre.argsort(descending=True)[:2]:
            error = error - pre[j].clamp(min=0) * d[j]
        unexplained += float(error @ error)
        total += float((row - rows.mean(0)).square().sum())
        left = error.clone()
        for j in sorted([2, 5, 7], key=lambda j: -float(pre[j]))[:2]:
            left = left - pre[j].clamp(min=0) * d[j]
        revived += float(left @ left)
        lacking += float(error @ error)
    assert found.reconstruction.item() == pytest.approx(unexplained / total, rel=1e-12)
    assert found.auxiliary.item() == pytest.approx(revived / lacking, rel=1e-12)
    assert found.total.item() == pytest.approx(unexplained / total + 0.5 * revived / lacking, rel=1e-12)


def test_without_dead_features_there_is_no_auxiliary_loss() -> None:
    found = sae_loss(
        small(), noise(6, 5, dtype=torch.float64), torch.zeros(12, dtype=torch.bool), n_revived=2, auxiliary_weight=1
    )
    assert found.auxiliary.item() == 0
    assert torch.equal(found.total, found.reconstruction)


def test_only_the_auxiliary_loss_reaches_dead_features() -> None:
    sae, rows = small(), noise(6, 5, seed=1, dtype=torch.float64)
    with torch.no_grad():
        sae.encoder_weight[4] = 0.0
        sae.encoder_bias[4] = 1e-3  # above 0, and never among the largest
    dead = torch.zeros(12, dtype=torch.bool)
    dead[4] = True
    for weight, reaches in ((0.0, False), (1.0, True)):
        sae.zero_grad()
        sae_loss(sae, rows, dead, n_revived=1, auxiliary_weight=weight).total.backward()
        assert sae.encoder_weight.grad is not None
        assert bool((sae.encoder_weight.grad[4] != 0).any()) == reaches


def test_steps_keep_decoder_rows_at_length_1_and_their_gradient_beside_them() -> None:
    sae = small()
    learner = Learner(sae)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for step in range(3):
        learner.loss(noise(32, 5, seed=step, dtype=torch.float64)).total.backward()
        learner.before_step()
        assert sae.decoder_weight.grad is not None
        along = (sae.decoder_weight.grad * sae.decoder_weight).sum(1)
        assert float(along.detach().abs().max()) < 1e-12
        optimizer.step()
        learner.after_step()
        optimizer.zero_grad()
        torch.testing.assert_close(sae.decoder_weight.norm(dim=1), torch.ones(12, dtype=torch.float64))
    drop_radial_gradient(sae)  # without a gradient: nothing to do


def test_a_feature_is_dead_after_so_many_rows_without_it_and_alive_once_active() -> None:
    sae = small()
    learner = Learner(sae, dead_after=10)
    with torch.no_grad():
        sae.encoder_bias[4] = -1e3
    for n_rows, is_dead in ((4, False), (5, False), (1, True)):
        learner.loss(noise(n_rows, 5, dtype=torch.float64))
        assert bool(learner.dead[4]) == is_dead
    with torch.no_grad():
        sae.encoder_bias[4] = 1e3
    learner.loss(noise(1, 5, dtype=torch.float64))
    assert not learner.dead[4]


def test_numbers_that_no_training_can_have_are_refused() -> None:
    with pytest.raises(UserError, match="dead_after: expected at least 1, got 0"):
        Learner(small(), dead_after=0)
    with pytest.raises(UserError, match="n_revived: expected at least 0, got -1"):
        Learner(small(), n_revived=-1)
    with pytest.raises(UserError, match="n_rows: expected at least 1, got 0"):
        ShuffleBuffer(0, 3, seed=0)


def test_full_buffer_gives_each_row_once_in_another_order() -> None:
    buffer = ShuffleBuffer(20, 1, seed=0)
    first = buffer.exchange(torch.arange(20.0)[:, None])
    assert sorted(first[:, 0].tolist()) == list(range(20)), "copies of rows that stay"
    out = torch.cat([buffer.exchange(torch.arange(20.0 + 7 * i, 27.0 + 7 * i)[:, None]) for i in range(30)])[:, 0]
    kept = buffer.rows[:, 0]
    assert sorted([*out.tolist(), *kept.tolist()]) == list(range(20 + 210))
    assert out.tolist() != sorted(out.tolist())


def test_more_rows_than_the_buffer_holds_pass_through_it() -> None:
    buffer = ShuffleBuffer(4, 2, seed=0)
    assert buffer.exchange(noise(11, 2)).shape == (11, 2)
    assert buffer.n_filled == 4


def test_buffer_goes_on_as_it_would_have() -> None:
    one, other = ShuffleBuffer(10, 3, seed=1), ShuffleBuffer(10, 3, seed=2)
    one.exchange(noise(7, 3))
    other.load_state_dict(one.state_dict())
    for seed in (1, 2):
        assert torch.equal(one.exchange(noise(6, 3, seed=seed)), other.exchange(noise(6, 3, seed=seed)))


def planted(n_rows: int, dictionary: Tensor, active: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """x = D z + noise with ``active`` entries of z in 0.5 … 1.5 a row."""
    generator = torch.Generator().manual_seed(seed)
    size = len(dictionary)
    places = torch.rand(n_rows, size, generator=generator).topk(active, dim=1).indices
    sizes = 0.5 + torch.rand(n_rows, active, generator=generator)
    z = torch.zeros(n_rows, size).scatter(1, places, sizes)
    x = z @ dictionary + 0.02 * torch.randn(n_rows, dictionary.shape[1], generator=generator)
    return x, z


def test_planted_dictionary_is_found_again() -> None:
    """Mean cosine ≥ .95 and F1 ≥ .9 (METHOD §5), through the buffer; before training neither holds."""
    dictionary = normalize(noise(64, 32, seed=11), dim=1)
    test_x, test_z = planted(2000, dictionary, 3, seed=99)
    sae = TopK(HERE, 32, 64, k=3, subtracts_bias=True)
    initialise(sae, planted(500, dictionary, 3, seed=0)[0], seed=1)
    learner, buffer = Learner(sae, dead_after=5_000), ShuffleBuffer(4000, 32, seed=2)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    assert match_dictionary(sae.decoder_weight, dictionary).mean_max_cosine < 0.7
    for step in range(800):
        rows = buffer.exchange(planted(512, dictionary, 3, seed=1000 + step)[0])
        learner.loss(rows).total.backward()
        learner.before_step()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (800 - step) / 270)
        optimizer.step()
        learner.after_step()
        optimizer.zero_grad()
    matched = match_dictionary(sae.decoder_weight, dictionary)
    with torch.no_grad():
        f1 = activation_f1(sae.encode(test_x), test_z, matched)
    assert matched.mean_max_cosine >= 0.95
    assert float(f1.mean()) >= 0.9


def test_training_stops_once_every_feature_is_dead() -> None:
    sae = small()
    with torch.no_grad():
        sae.encoder_bias.fill_(-1e3)
    learner = Learner(sae, dead_after=10)
    learner.loss(noise(10, 5, dtype=torch.float64))
    with pytest.raises(NumericalStop, match="every feature is dead: none was active in the last 10 states"):
        learner.loss(noise(1, 5, dtype=torch.float64))
