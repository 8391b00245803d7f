"""Recovery in KL: golden ends, a second implementation, any cut into chunks, and what is undefined stays undefined."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.tiny_models import make_model, random_pairs
from tiltmeter.geometry.directions import steering_vector, update_directions
from tiltmeter.models.layers import Unembedding, decoder_blocks, unembedding
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.pairs.log_probs import _logits, target_hidden_states
from tiltmeter.steering.recovery import Direction, RecoveryMoments, kl_divergences, restricted_updates

STRENGTHS = [0.0, 0.5, 1.0, 2.0]
DIRECTIONS: list[Direction] = ["interpolation", "inversion"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sweep(n: int = 30, vocab: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    policy, base = 2 * noise(n, vocab), 2 * noise(n, vocab, seed=1)
    return policy, base, torch.stack([base + s * (policy - base) for s in STRENGTHS])


def test_kl_is_that_of_torch_distributions_and_of_a_sum_by_hand() -> None:
    p, q = noise(7, 5), noise(7, 5, seed=1)
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(categorical(logits=p), categorical(logits=q))
    assert_close(kl_divergences(p, q), expected)
    first = [math.exp(x) / sum(map(math.exp, p[0].tolist())) for x in p[0].tolist()]
    other = [math.exp(x) / sum(map(math.exp, q[0].tolist())) for x in q[0].tolist()]
    by_hand = sum(a * math.log(a / b) for a, b in zip(first, other, strict=True))
    assert float(kl_divergences(p, q)[0]) == pytest.approx(by_hand)


def test_half_precision_is_widened_before_the_softmax() -> None:
    p, q = noise(3, 1000).bfloat16(), noise(3, 1000, seed=1).bfloat16()
    found = kl_divergences(p, q)
    assert found.dtype == torch.float32
    assert_close(found, kl_divergences(p.double(), q.double()).float(), rtol=1e-5, atol=1e-6)


def test_words_that_cannot_be_said_add_nothing_and_wrong_certainty_costs_infinity() -> None:
    p = torch.tensor([[0.0, -math.inf, 0.0]])
    assert kl_divergences(p, p).tolist() == [0.0]
    assert float(kl_divergences(p, torch.zeros(1, 3))) == pytest.approx(math.log(1.5))
    assert kl_divergences(torch.zeros(1, 3), p).tolist() == [math.inf]


def test_agreement_of_nan_is_nan_and_not_one() -> None:
    bad = torch.tensor([[math.nan, 1.0]])
    assert kl_divergences(bad, bad).isnan().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_start_recovers_nothing_and_the_goal_everything(direction: Direction) -> None:
    policy, base, steered = sweep()
    if direction == "inversion":
        steered = torch.stack([policy + s * (base - policy) for s in STRENGTHS])
    moments = RecoveryMoments(STRENGTHS, n_rows=5, direction=direction)
    moments.update(policy, base, steered, torch.arange(30) % 5)
    names = [f"p{i}" for i in range(5)]
    start, (zero, half, one, beyond) = moments.summary(names)
    assert tuple(zero.recovery) == pytest.approx((0, 0, 0), abs=1e-12)
    assert tuple(one.recovery) == pytest.approx((1, 1, 1), abs=1e-12)
    assert tuple(one.kl) == pytest.approx((0, 0, 0), abs=1e-12)
    assert one.agreement.value == one.agreement.high == 1
    assert one.agreement.low == pytest.approx(0.025 ** (1 / 5)), "five prompts that all agree are no certainty"
    assert 0 < half.recovery.value < 1
    assert beyond.recovery.value < 1
    assert start == zero


def test_inversion_measures_from_the_base() -> None:
    policy, base, steered = sweep()
    moments = RecoveryMoments(STRENGTHS, n_rows=1, direction="inversion")
    moments.update(policy, base, steered, torch.zeros(30, dtype=torch.long))
    (_, half, _, _) = moments.summary(["a"]).steered
    expected = 1 - kl_divergences(base, steered[1]).mean() / kl_divergences(base, policy).mean()
    assert half.recovery.value == pytest.approx(float(expected))


def test_own_updates_at_the_final_site_give_the_policys_logits_and_recovery_one() -> None:
    """At final_post_norm h₀ + δ_i is h_π itself: λ = 1 is the policy, and −δ_i from the policy the base."""
    head = Unembedding(noise(40, 8))
    h0, hp = noise(20, 8, seed=1), noise(20, 8, seed=2)
    rows = torch.arange(20) % 4
    policy, base = hp @ head.weight.T, h0 @ head.weight.T
    forth = RecoveryMoments([0.0, 1.0], n_rows=4)
    forth.update(policy, base, ((h0 + s * (hp - h0)) @ head.weight.T for s in (0.0, 1.0)), rows)
    back = RecoveryMoments([0.0, 1.0], n_rows=4, direction="inversion")
    back.update(policy, base, ((hp - s * (hp - h0)) @ head.weight.T for s in (0.0, 1.0)), rows)
    for moments in (forth, back):
        found = moments.summary(list("abcd")).steered
        assert [x.recovery.value for x in found] == pytest.approx([0, 1], abs=1e-12)
        assert found[1].agreement.value == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "phi"])
def test_a_tuned_model_is_recovered_by_its_own_updates_in_front_of_the_unembedding(family: str) -> None:
    """Head with scale, bias or cap: its module gives the logits, as a sweep would have them."""
    base, policy = (make_model(family, attn="eager").eval() for _ in range(2))
    with torch.no_grad():
        for parameter in decoder_blocks(policy).parameters():
            parameter.add_(0.1 * noise(*parameter.shape).to(parameter.dtype))
    batch = collate_pairs(random_pairs(4), pair_index=range(4), layout="concatenated")
    head, hidden = unembedding(base), []
    with torch.no_grad():
        for model in (base, policy):
            hidden.append(target_hidden_states(model, batch))
        h0, hp = hidden
        logits = [_logits(h, head.weight, head.bias, head.scale, head.soft_cap)[0] for h in (hp, h0, h0 + (hp - h0))]
    moments = RecoveryMoments([0.0, 1.0], n_rows=8)
    moments.update(logits[0], logits[1], logits[1:], batch.target_sequences)
    (zero, one) = moments.summary([f"p{i % 4}" for i in range(8)]).steered
    assert zero.recovery.value == 0
    assert zero.kl.value > 1e-3
    assert one.recovery.value == pytest.approx(1, abs=1e-5)
    assert moments.row_sums().n_tokens.tolist() == torch.bincount(batch.target_sequences).tolist()


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_any_cut_and_order_of_the_places_gives_the_whole(n: int, pieces: int, n_rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy, base, steered = sweep(n)
    rows = torch.randint(-1, n_rows, (n,), generator=generator)
    whole, cut = RecoveryMoments(STRENGTHS, n_rows=n_rows), RecoveryMoments(STRENGTHS, n_rows=n_rows)
    whole.update(policy, base, steered, rows)
    for part in torch.randperm(n, generator=generator).tensor_split(pieces):
        cut.update(policy[part], base[part], steered[:, part], rows[part])
    for found, expected in zip(cut.row_sums(), whole.row_sums(), strict=True):
        assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for row in range(n_rows):
        mine = rows == row
        assert_close(whole.row_sums().kl_steered[2, row], kl_divergences(policy, steered[2])[mine].sum())
        assert_close(whole.row_sums().n_tokens[row], mine.sum().double())


def test_steered_logits_are_held_one_strength_at_a_time() -> None:
    policy, base, steered = sweep()
    alive = []

    def one_by_one() -> Iterator[Tensor]:
        for logits in steered:
            alive.append(len(alive))
            yield logits

    lazily, at_once = RecoveryMoments(STRENGTHS, n_rows=1), RecoveryMoments(STRENGTHS, n_rows=1)
    lazily.update(policy, base, one_by_one(), torch.zeros(30, dtype=torch.long))
    at_once.update(policy, base, steered, torch.zeros(30, dtype=torch.long))
    assert alive == [0, 1, 2, 3]
    assert torch.equal(lazily.row_sums().kl_steered, at_once.row_sums().kl_steered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_difference_recovery_is_undefined(dtype: torch.dtype) -> None:
    policy, _, steered = sweep(30, 200)
    policy, steered = policy.to(dtype), steered[:, :, :200].to(dtype)
    for base in (policy, policy * (1 + torch.finfo(dtype).eps), policy + 3):
        moments = RecoveryMoments(STRENGTHS, n_rows=2)
        moments.update(policy, base, steered, torch.arange(30) % 2)
        for found in moments.summary(["a", "b"]).steered:
            assert all(math.isnan(x) for x in found.recovery)
            assert math.isfinite(found.kl.value)


def test_one_bad_row_makes_the_figure_missing() -> None:
    policy, base, steered = sweep()
    steered[1, 3, 2] = math.nan
    moments = RecoveryMoments(STRENGTHS, n_rows=3)
    moments.update(policy, base, steered, torch.arange(30) % 3)
    zero, half, *_ = moments.summary(list("abc")).steered
    assert zero.recovery.value == 0
    assert math.isnan(half.recovery.value)
    assert math.isnan(half.agreement.value)


def test_the_interval_is_over_prompts_and_holds_the_ratio_of_sums() -> None:
    n_rows, tokens = 60, 10
    start = noise(n_rows).exp().repeat_interleave(tokens)
    policy = torch.zeros(n_rows * tokens, 2, dtype=torch.float64)
    base = torch.stack([start, -start], dim=1)
    half = base / 2
    rows = torch.arange(n_rows).repeat_interleave(tokens)
    moments = RecoveryMoments([0.5], n_rows=n_rows)
    moments.update(policy, base, half[None], rows)
    (found,) = moments.summary([f"p{i // 2}" for i in range(n_rows)]).steered
    ratio = kl_divergences(policy, half).sum() / kl_divergences(policy, base).sum()
    assert found.recovery.value == pytest.approx(1 - float(ratio))
    assert found.recovery.low < found.recovery.value < found.recovery.high
    (wide,) = moments.summary([f"p{i // 20}" for i in range(n_rows)]).steered
    assert wide.recovery.value == found.recovery.value
    assert (found.n_tokens, found.n_rows) == (600, 60)


def test_rows_without_tokens_count_nowhere() -> None:
    policy, base, steered = sweep()
    moments = RecoveryMoments(STRENGTHS, n_rows=4)
    moments.update(policy, base, steered, torch.where(torch.arange(30) < 10, 2, -1))
    found = moments.summary(list("abcd")).steered[1]
    assert (found.n_tokens, found.n_rows) == (10, 1)
    assert (found.kl.low, found.kl.high) == (-math.inf, math.inf), "one prompt has no interval"


def test_wrong_shapes_are_refused() -> None:
    policy, base, steered = sweep()
    rows = torch.zeros(30, dtype=torch.long)
    moments = RecoveryMoments(STRENGTHS, n_rows=1)
    with pytest.raises(ValueError, match="expected logits of 4 strengths, got 3"):
        moments.update(policy, base, steered[:3], rows)
    with pytest.raises(ValueError, match=r"logits of shape \(30, 12\), got \(1, 12\)"):
        moments.update(policy, base, (logits[:1] for logits in steered), rows)
    assert not moments.row_sums().n_tokens.any(), "what was refused leaves nothing behind"
    with pytest.raises(ValueError, match="expected 1 names of groups, got 2"):
        moments.summary(["a", "b"])
    with pytest.raises(ValueError, match="expected strengths and rows"):
        RecoveryMoments([], n_rows=1)
    with pytest.raises(ValueError, match="at least one row"):
        moments.summary(["a"])


def test_the_ladder_of_ranks_ends_at_the_rows_own_update() -> None:
    base, policy = noise(30, 8), noise(30, 8, seed=1) + 2
    directions = update_directions(base, policy, 8, centred=False).directions
    updates, v = policy - base, steering_vector(base, policy)
    found = restricted_updates(updates, v, directions, [1, 2, 8])
    assert list(found) == ["mean", "rank_1", "rank_2", "rank_8", "own"]
    assert_close(found["mean"], v.expand(30, -1))
    left = [float((updates - rows).norm()) for rows in found.values()]
    sigma = torch.linalg.svdvals(updates)
    assert left[1:] == pytest.approx([float(sigma[rank:].norm()) for rank in (1, 2, 8, 8)], abs=1e-9)
    assert left[0] >= left[1], "no constant comes closer than the best direction with lengths of its own"
    with pytest.raises(ValueError, match="ranks from 1 to 8, got"):
        restricted_updates(updates, v, directions, [9])
