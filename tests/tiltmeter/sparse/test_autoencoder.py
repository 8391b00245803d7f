"""Sparse autoencoders against sums by hand in float64, with and without norms; models that they don't fit."""

import math

import pytest
import torch
from torch import Tensor

from tests.tiltmeter.sparse.dictionaries import D_MODEL, WIDTH, noise
from tests.tiny_models import make_model
from tiltmeter.errors import UserError
from tiltmeter.sparse.autoencoder import JumpReLU, SaeId, SparseAutoencoder, TopK, weights_of

HERE = SaeId("layer_00")
X = noise(7, D_MODEL, seed=5, dtype=torch.float64)


def filled(sae: SparseAutoencoder, *, seed: int = 0) -> SparseAutoencoder:
    """The same with random float64 weights."""
    sae = sae.double()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sae.named_parameters()):
            values = noise(*parameter.shape, seed=seed + i, dtype=torch.float64)
            parameter.copy_(values.abs() / 2 if name == "threshold" else values)
    return sae


def test_golden_values_of_two_features() -> None:
    sae = JumpReLU(HERE, 2, 2).double()
    with torch.no_grad():
        sae.encoder_weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        sae.encoder_bias.copy_(torch.tensor([0.5, -1.0]))
        sae.threshold.copy_(torch.tensor([1.0, 0.5]))
        sae.decoder_weight.copy_(torch.tensor([[3.0, 0.0], [0.0, -1.0]]))
        sae.decoder_bias.copy_(torch.tensor([0.25, 0.75]))
    x = torch.tensor([[1.0, 1.0], [0.5, 0.75], [-4.0, 0.7]], dtype=torch.float64)
    expected = torch.tensor([[1.5, 1.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)  # at the threshold: off
    torch.testing.assert_close(sae.encode(x), expected, rtol=0, atol=0)
    made = torch.tensor([[4.75, -0.25], [0.25, 0.75], [0.25, 0.75]], dtype=torch.float64)
    torch.testing.assert_close(sae(x), made, rtol=0, atol=0)
    torch.testing.assert_close(sae.error(x), x - made, rtol=0, atol=0)
    assert not sae.error(x).requires_grad


def test_top_k_keeps_the_largest_of_each_row_and_nothing_below_0() -> None:
    sae = TopK(HERE, 3, 4, k=2).double()
    with torch.no_grad():
        sae.encoder_weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]))
    features = sae.encode(torch.tensor([[3.0, 1.0, 2.0], [-1.0, -2.0, 0.5]], dtype=torch.float64))
    assert features.tolist() == [[3, 0, 0, 6], [0, 0, 0.5, 0]]


@pytest.mark.parametrize("subtracts", [False, True])
@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
def test_norms_are_those_of_saelens_by_hand(norm: str, subtracts: bool) -> None:
    sae = filled(JumpReLU(HERE, D_MODEL, WIDTH, norm=norm, subtracts_bias=subtracts))
    w = dict(sae.named_parameters())
    expected = []
    for row in X:
        shift, divide, multiply = 0.0, 1.0, 1.0
        if norm == "constant_norm_rescale":
            divide = multiply = math.sqrt(float((row**2).sum()) / D_MODEL)
        elif norm == "layer_norm":
            shift = float(row.mean())
            multiply = math.sqrt(float(((row - shift) ** 2).sum()) / (D_MODEL - 1))
            divide = multiply + 1e-5
        inside = (row - shift) / divide
        inside = inside - w["decoder_bias"] if subtracts else inside
        pre = w["encoder_weight"] @ inside + w["encoder_bias"]
        features = torch.where(pre > w["threshold"], pre, torch.zeros_like(pre))
        expected.append((features @ w["decoder_weight"] + w["decoder_bias"]) * multiply + shift)
    torch.testing.assert_close(sae(X), torch.stack(expected), rtol=1e-12, atol=1e-12)
    change = noise(len(X), WIDTH, seed=3, dtype=torch.float64)
    moved = sae.decode(sae.encode(X) + change, like=X) - sae(X)
    torch.testing.assert_close(sae.move(change, X), moved, rtol=1e-10, atol=1e-10)


def test_decoding_without_the_states_whose_norm_it_needs_is_an_error() -> None:
    sae = JumpReLU(HERE, D_MODEL, WIDTH, norm="layer_norm")
    with pytest.raises(ValueError, match="like: expected the states"):
        sae.decode(torch.zeros(1, WIDTH))


def test_16_bit_states_are_encoded_in_the_weights_dtype() -> None:
    sae = filled(TopK(HERE, D_MODEL, WIDTH, k=3)).float()
    states: Tensor = X.bfloat16()
    assert sae.encode(states).dtype == torch.float32
    torch.testing.assert_close(sae.encode(states), sae.encode(states.float()))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: JumpReLU(SaeId("layer_7"), 2, 2), "site: expected one such as layer_07 .* got 'layer_7'"),
        (lambda: JumpReLU(HERE, 2, 2, norm="l2"), "norm: expected one of none, .* got 'l2'"),
        (lambda: JumpReLU(HERE, 2, 0), "expected at least one feature .* got 0 of 2"),
        (lambda: TopK(HERE, 2, 4, k=5), "k: expected 1 … 4, .* got 5"),
    ],
)
def test_options_that_no_autoencoder_can_have_are_refused(made: object, words: str) -> None:
    assert callable(made)
    with pytest.raises(UserError, match=words):
        made()


def test_autoencoder_of_another_site_width_or_model_is_refused_in_one_line() -> None:
    model = make_model("llama")
    width = model.config.hidden_size
    own = SaeId("layer_00", "toy", weights_of(model))
    JumpReLU(own, width, 4).check_fits(model)
    for sae, words in (
        (JumpReLU(SaeId("layer_99"), width, 4), "layer_99: this model has 2 blocks"),
        (JumpReLU(HERE, width + 1, 4), f"expected width {width}, .* got {width + 1}"),
        (JumpReLU(own._replace(weights="0" * 64), width, 4), "trained on toy with other weights"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            sae.check_fits(model)
        assert "\n" not in str(raised.value)
    JumpReLU(own._replace(weights="0" * 64), width, 4).check_fits(model, any_model=True)


def test_names_of_models_are_compared_without_their_owner() -> None:
    model = make_model("llama")
    model.config._name_or_path = "google/gemma-2-2b"
    JumpReLU(SaeId("layer_00", "gemma-2-2b"), model.config.hidden_size, 4).check_fits(model)
    with pytest.raises(UserError, match="trained on gemma-2-2b-it with other weights than google/gemma-2-2b"):
        JumpReLU(SaeId("layer_00", "gemma-2-2b-it"), model.config.hidden_size, 4).check_fits(model)
