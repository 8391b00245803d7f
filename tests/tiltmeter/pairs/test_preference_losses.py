import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.errors import UserError
from tiltmeter.pairs.preference_losses import (
    PREFERENCE_LOSSES,
    PairLogProbs,
    hinge_loss,
    ipo_loss,
    make_preference_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)

margins_in_nats = st.floats(-60, 60)
betas = st.floats(0.01, 5)
flip_rates = st.floats(0, 0.45)


def with_margin(margin: float | Tensor, tokens: int = 1) -> PairLogProbs:
    """Pairs whose log-ratio is ``margin`` on chosen and 0 on rejected."""
    m = torch.as_tensor(margin, dtype=torch.float64).reshape(-1)
    zero, count = torch.zeros_like(m), torch.full_like(m, tokens).long()
    return PairLogProbs(m - 7.0, zero - 5.0, zero - 7.0, zero - 5.0, count, count)


def slope(loss: Callable[[PairLogProbs], Tensor], margin: float) -> float:
    m = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(with_margin(m)).sum(), m)
    return gradient.item()


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sigmoid", {"beta": 0.1}, math.log(2)),
        ("sigmoid", {"beta": 0.3, "label_smoothing": 0.2}, math.log(2)),
        ("robust", {"beta": 0.1, "label_smoothing": 0.2}, math.log(2)),
        ("hinge", {"beta": 0.1}, 1.0),
        ("ipo", {"beta": 0.1}, 25.0),
        ("ipo", {"beta": 0.25}, 1 / (4 * 0.25**2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_policy_equal_to_reference_gives_the_known_constant(
    name: str, options: dict[str, float], expected: float, dtype: torch.dtype
) -> None:
    chosen, rejected = torch.tensor([-31.7, -0.4], dtype=dtype), torch.tensor([-12.9, -250.0], dtype=dtype)
    count = torch.tensor([9, 1])
    losses = make_preference_loss(name, **options)(PairLogProbs(chosen, rejected, chosen, rejected, count, count + 3))
    assert_close(losses, torch.full_like(losses, expected), rtol=1e-7, atol=0)


def test_ipo_vanishes_at_its_target_margin() -> None:
    assert_close(ipo_loss(with_margin(1 / (2 * 0.1)), beta=0.1), torch.zeros(1, dtype=torch.float64))


def test_ipo_compares_means_per_token_so_length_cancels() -> None:
    short, long = with_margin(0.8, tokens=1), with_margin(8.0, tokens=10)
    assert_close(ipo_loss(short, beta=0.5), ipo_loss(long, beta=0.5))


def test_simpo_is_ln_2_where_the_mean_difference_is_its_target() -> None:
    chosen, rejected = torch.tensor([-6.0]), torch.tensor([-10.0])
    pairs = PairLogProbs(chosen, rejected, chosen_tokens=torch.tensor([4]), rejected_tokens=torch.tensor([5]))
    assert_close(simpo_loss(pairs, beta=2.5, gamma_beta_ratio=0.5), torch.tensor([math.log(2)]))


def test_three_pairs_worked_by_hand() -> None:
    pairs = PairLogProbs(
        chosen=torch.tensor([-10.0, -20.0, -6.0]),
        rejected=torch.tensor([-12.0, -15.0, -9.0]),
        reference_chosen=torch.tensor([-11.0, -18.0, -6.0]),
        reference_rejected=torch.tensor([-11.0, -16.0, -9.0]),
        chosen_tokens=torch.tensor([5, 10, 2]),
        rejected_tokens=torch.tensor([4, 5, 3]),
    )
    # log-ratios chosen: −10+11 = 1, −20+18 = −2, 0; rejected: −12+11 = −1, −15+16 = 1, 0; m = 2, −3, 0
    assert pairs.margins().tolist() == [2.0, -3.0, 0.0]
    # β = ½: βm = 1, −1.5, 0; −log σ: ln(1+e⁻¹) = .313262, ln(1+e^1.5) = 1.701413, ln 2 = .693147
    assert_close(sigmoid_loss(pairs, beta=0.5), torch.tensor([0.313262, 1.701413, 0.693147]), rtol=0, atol=1e-6)
    # ε = .1: .9·.313262 + .1·1.313262 = .413262; .9·1.701413 + .1·.201413 = 1.551413
    smooth = sigmoid_loss(pairs, beta=0.5, label_smoothing=0.1)
    assert_close(smooth, torch.tensor([0.413262, 1.551413, 0.693147]), rtol=0, atol=1e-6)
    # robust: (.9·.313262 − .1·1.313262)/.8 = .188262; (.9·1.701413 − .1·.201413)/.8 = 1.888913
    robust = robust_loss(pairs, beta=0.5, label_smoothing=0.1)
    assert_close(robust, torch.tensor([0.188262, 1.888913, 0.693147]), rtol=0, atol=1e-6)
    # hinge: 1 − βm = 0, 2.5, 1
    assert_close(hinge_loss(pairs, beta=0.5), torch.tensor([0.0, 2.5, 1.0]))
    # IPO: h = 1/5 + 1/4 = .45, −2/10 − 1/5 = −.4, 0; target 1/(2β) = 1: (−.55)², (−1.4)², 1
    assert_close(ipo_loss(pairs, beta=0.5), torch.tensor([0.3025, 1.96, 1.0]))
    # SimPO, β = 2, γ/β = ½: means −2 and −3, −2 and −3, −3 and −3: 2(1−½) = 1, 1, −1
    assert_close(simpo_loss(pairs, beta=2.0), torch.tensor([0.313262, 0.313262, 1.313262]), rtol=0, atol=1e-6)
    # RPO: −log π of chosen per token is 10/5 = 2, 20/10 = 2, 6/2 = 3, of which a half is added
    rpo = make_preference_loss("sigmoid", sft_weight=0.5, beta=0.5)(pairs)
    assert_close(rpo, torch.tensor([1.313262, 2.701413, 2.193147]), rtol=0, atol=1e-6)


@given(margins_in_nats, betas)
def test_slope_of_dpo_is_minus_beta_sigma_of_minus_beta_m(m: float, beta: float) -> None:
    assert slope(lambda p: sigmoid_loss(p, beta=beta), m) == pytest.approx(
        -beta * sigmoid(-beta * m), rel=1e-9, abs=1e-14
    )


@given(margins_in_nats, betas, flip_rates)
def test_slopes_of_cdpo_and_robust_dpo_are_mixtures_of_both_directions(m: float, beta: float, eps: float) -> None:
    right, wrong = sigmoid(-beta * m), sigmoid(beta * m)
    smoothed = slope(lambda p: sigmoid_loss(p, beta=beta, label_smoothing=eps), m)
    assert smoothed == pytest.approx(-beta * ((1 - eps) * right - eps * wrong), rel=1e-9, abs=1e-12)
    robust = slope(lambda p: robust_loss(p, beta=beta, label_smoothing=eps), m)
    assert robust == pytest.approx(-beta * ((1 - eps) * right + eps * wrong) / (1 - 2 * eps), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_autograd_agrees_with_finite_differences(name: str) -> None:
    loss = make_preference_loss(name)
    count = torch.tensor([3, 4])
    reference = torch.tensor([-5.0, -6.0], dtype=torch.float64)

    def of_policy(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(PairLogProbs(chosen, rejected, reference, reference - 1, count, count + 1))

    policy = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([-4.0, -7.5], [-6.5, -6.0])]
    assert torch.autograd.gradcheck(of_policy, policy)


@given(margins_in_nats, betas, flip_rates)
def test_robust_dpo_is_unbiased_when_labels_flip_at_its_rate(m: float, beta: float, eps: float) -> None:
    right, flipped = (robust_loss(with_margin(x), beta=beta, label_smoothing=eps) for x in (m, -m))
    expected = (1 - eps) * right + eps * flipped
    assert_close(expected, sigmoid_loss(with_margin(m), beta=beta), rtol=1e-9, atol=1e-9)


@given(margins_in_nats, betas)
def test_smoothing_by_one_half_cannot_tell_the_sides_apart(m: float, beta: float) -> None:
    ahead, behind = (sigmoid_loss(with_margin(x), beta=beta, label_smoothing=0.5) for x in (m, -m))
    assert_close(ahead, behind)


@given(st.lists(st.floats(-100, 0), min_size=4, max_size=4))
def test_swapping_the_sides_negates_the_margin(logps: list[float]) -> None:
    a, b, c, d = (torch.tensor([x], dtype=torch.float64) for x in logps)
    assert_close(PairLogProbs(a, b, c, d).margins(), -PairLogProbs(b, a, d, c).margins())


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
@pytest.mark.parametrize("sign", [-1, 1])
def test_margins_of_ten_thousand_over_beta_stay_finite(name: str, sign: int) -> None:
    loss = make_preference_loss(name, beta=1.0)
    policy = torch.tensor([sign * 1e4], requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1, dtype=torch.long)
    value = loss(PairLogProbs(policy, zero, zero, zero, one, one))
    value.sum().backward()
    assert value.isfinite().all()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()


IGNORED = [
    ("hinge", "label_smoothing"),
    ("ipo", "label_smoothing"),
    ("simpo", "label_smoothing"),
    ("sigmoid", "gamma_beta_ratio"),
    ("robust", "gamma_beta_ratio"),
    ("hinge", "gamma_beta_ratio"),
    ("ipo", "gamma_beta_ratio"),
]


@pytest.mark.parametrize(("name", "option"), IGNORED)
def test_an_option_that_a_loss_ignores_is_refused(name: str, option: str) -> None:
    with pytest.raises(UserError, match=f"module.loss={name} has no option {option}"):
        make_preference_loss(name, **{option: 0.1})


def test_the_list_of_ignored_options_is_complete() -> None:
    options = ("label_smoothing", "gamma_beta_ratio")
    has = {("sigmoid", "label_smoothing"), ("robust", "label_smoothing"), ("simpo", "gamma_beta_ratio")}
    assert {(name, option) for name in PREFERENCE_LOSSES for option in options} == has | set(IGNORED)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sigmoid", {"label_smoothing": -0.1}),
        ("sigmoid", {"label_smoothing": 0.6}),
        ("sigmoid", {"label_smoothing": math.nan}),
        ("robust", {"label_smoothing": 0.5}),
        ("robust", {"label_smoothing": -0.01}),
        ("sigmoid", {"beta": 0.0}),
        ("ipo", {"beta": -1.0}),
        ("hinge", {"beta": math.nan}),
        ("hinge", {"beta": math.inf}),
        ("simpo", {"gamma_beta_ratio": -1.0}),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"module.{next(iter(options))}: expected"):
        make_preference_loss(name, **options)


def test_an_unknown_loss_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="expected one of sigmoid, robust, hinge, ipo, simpo, got dpo"):
        make_preference_loss("dpo")


def test_options_left_out_take_the_default_of_the_loss() -> None:
    assert make_preference_loss("sigmoid", beta=None, label_smoothing=None).beta == 0.1
    assert make_preference_loss("simpo").beta == 10.0


def test_loss_without_reference_or_token_counts_is_refused() -> None:
    zero = torch.zeros(1)
    with pytest.raises(ValueError, match="reference log-probs"):
        sigmoid_loss(PairLogProbs(zero, zero))
    with pytest.raises(ValueError, match="token counts"):
        simpo_loss(PairLogProbs(zero, zero))
