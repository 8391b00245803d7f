from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from tests.tiny_models import FLOAT32_NORMS, largest_difference, make_model, random_pairs, reference_log_probs
from tiltmeter.errors import UserError
from tiltmeter.models.layers import Unembedding
from tiltmeter.pairs.batch import Layout, TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs, sum_by_sequence, token_log_probs

LAYOUTS: tuple[Layout, ...] = ("shared_prefix", "concatenated")
PAIRS = random_pairs(6)
Measured = tuple[Tensor, dict[str, Tensor]]


def with_gradients(model: PreTrainedModel, logps: Tensor) -> Measured:
    """Log-probs and the gradients of a fixed random combination of them."""
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    gradients = torch.autograd.grad((logps * weights).sum(), parameters)
    return logps.detach(), dict(zip(names, gradients, strict=True))


def ours(model: PreTrainedModel, layout: Layout, chunk_tokens: int = 7) -> Measured:
    batch = collate_pairs(PAIRS, pair_index=range(len(PAIRS)), layout=layout)
    return with_gradients(model, sequence_log_probs(model, batch, chunk_tokens=chunk_tokens))


def reference(model: PreTrainedModel) -> Measured:
    return with_gradients(model, reference_log_probs(model, PAIRS))


@cache
def modelled(family: str, dtype: torch.dtype, attn: str) -> tuple[PreTrainedModel, Measured]:
    """A model that no test changes, and its reference, which both layouts are held to."""
    model = make_model(family, dtype, attn)
    return model, reference(model)


def worst(a: Measured, b: Measured) -> float:
    """Largest difference in a log-prob, or in a gradient relative to the largest gradient (at least 1)."""
    scale = max(1.0, *(g.abs().max().item() for g in b[1].values()))
    gradients = max(largest_difference(a[1][name], b[1][name]) for name in b[1])
    return max(largest_difference(a[0], b[0]), gradients / scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_gpt2_in_float64_equals_the_reference_loop(layout: Layout, attn: str) -> None:
    model, expected = modelled("gpt2", torch.float64, attn)
    assert worst(ours(model, layout), expected) <= 1e-10


KERNELS = [
    (family, attn)
    for family in (*FLOAT32_NORMS, "cohere", "granite", "phi")
    for attn in ("sdpa", "eager")
    if (family, attn) != ("gemma2", "sdpa")  # caps attention logits, which that kernel can't
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "attn"), KERNELS)
def test_other_families_in_float64_equal_the_reference_up_to_their_float32_norms(
    family: str, attn: str, layout: Layout
) -> None:
    model, expected = modelled(family, torch.float64, attn)
    assert worst(ours(model, layout), expected) <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "attn"), [("gpt2", "sdpa"), *KERNELS])
def test_float32_equals_the_reference(family: str, attn: str, layout: Layout) -> None:
    model, expected = modelled(family, torch.float32, attn)
    assert worst(ours(model, layout), expected) <= 1e-5


@pytest.mark.parametrize("chunk_tokens", [1, 5, 10_000])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi"])
def test_size_of_chunks_changes_nothing(family: str, chunk_tokens: int) -> None:
    model, expected = modelled(family, torch.float64, "eager")
    assert worst(ours(model, "shared_prefix", chunk_tokens), expected) <= (1e-10 if family == "gpt2" else 1e-6)


def test_a_frozen_unembedding_gets_no_gradient_and_the_rest_keeps_its_own() -> None:
    model = make_model("llama", torch.float64)
    _, before = ours(model, "shared_prefix")
    model.get_output_embeddings().weight.requires_grad_(False)
    _, after = ours(model, "shared_prefix")
    assert set(before) - set(after) == {"lm_head.weight"}
    for name, gradient in after.items():
        assert_close(gradient, before[name], rtol=0, atol=1e-12)


def test_tied_embeddings_collect_the_gradients_of_both_uses() -> None:
    model = make_model("llama", torch.float64, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert worst(ours(model, "shared_prefix"), reference(model)) <= 1e-6


HEADS = {
    "plain": Unembedding(torch.empty(0, 0)),
    "scaled": Unembedding(torch.empty(0, 0), scale=0.0625),
    "capped": Unembedding(torch.empty(0, 0), soft_cap=2.0),
    "scaled and capped": Unembedding(torch.empty(0, 0), scale=1 / 13, soft_cap=0.5),
}


def head_inputs(dtype: torch.dtype = torch.float64, n: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((n, 6), (23, 6), (23,))
    hidden, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)
    return hidden, weight, bias, torch.randint(0, 23, (n,), generator=g)


def autograd_log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, head: Unembedding) -> Tensor:
    logits = head.scale * F.linear(hidden, weight, bias)
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    return -F.cross_entropy(logits, ids, reduction="none")


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_every_kind_of_head_equals_autograd(kind: str, with_bias: bool, chunk_tokens: int) -> None:
    hidden, weight, bias, ids = head_inputs()
    like = HEADS[kind]
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    head = Unembedding(weight, bias if with_bias else None, like.scale, like.soft_cap)
    upstream = torch.linspace(-1, 2, len(ids), dtype=torch.float64)
    logps = token_log_probs(hidden, head, ids, chunk_tokens=chunk_tokens)
    expected = autograd_log_probs(hidden, weight, head.bias, ids, like)
    assert_close(logps, expected, rtol=0, atol=1e-12)
    measured = torch.autograd.grad(logps, inputs, upstream)
    assert_close(measured, torch.autograd.grad(expected, inputs, upstream), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", HEADS)
def test_gradients_agree_with_finite_differences(kind: str) -> None:
    hidden, weight, bias, ids = head_inputs(n=5)
    like = HEADS[kind]

    def function(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return token_log_probs(h, Unembedding(w, b, like.scale, like.soft_cap), ids, chunk_tokens=2)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_log_probs_of_sixteen_bit_weights_come_in_float32_and_no_worse_than_eager_ones() -> None:
    exact = reference_log_probs(make_model("llama", torch.float64), PAIRS)
    model = make_model("llama", torch.bfloat16)
    with torch.no_grad():
        eager = reference_log_probs(model, PAIRS)
        for layout in LAYOUTS:
            batch = collate_pairs(PAIRS, pair_index=range(len(PAIRS)), layout=layout)
            logps = sequence_log_probs(model, batch)
            assert logps.dtype == torch.float32
            assert largest_difference(logps, exact) <= 2 * largest_difference(eager, exact)


def test_under_autocast_the_softmax_stays_in_float32() -> None:
    model = make_model("llama")
    exact = reference_log_probs(make_model("llama", torch.float64), PAIRS)
    batch = collate_pairs(PAIRS, pair_index=range(len(PAIRS)))
    with torch.autocast("cpu", torch.bfloat16):
        logps = sequence_log_probs(model, batch)
        eager = reference_log_probs(model, PAIRS)
    assert logps.dtype == torch.float32
    assert largest_difference(logps, exact) <= 2 * largest_difference(eager, exact)
    logps.sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_gradient_of_sixteen_bit_weights_accumulates_in_float32() -> None:
    hidden, weight, _, ids = head_inputs(torch.bfloat16, n=3000)
    expected = torch.autograd.grad(
        autograd_log_probs(hidden.double(), weight.double(), None, ids, HEADS["plain"]).sum(), weight
    )[0]
    for chunk_tokens in (1, 3000):
        logps = token_log_probs(hidden, Unembedding(weight), ids, chunk_tokens=chunk_tokens)
        (measured,) = torch.autograd.grad(logps.sum(), weight)
        assert measured.dtype == torch.bfloat16
        assert_close(measured.float(), expected.float(), rtol=0.01, atol=0.01 * expected.float().abs().max().item())


def test_sum_over_four_thousand_tokens_is_exact_to_a_thousandth() -> None:
    tokens = -3 * torch.rand(2, 4000, generator=torch.Generator().manual_seed(0))
    sums = sum_by_sequence(tokens.flatten(), torch.arange(2).repeat_interleave(4000), 2)
    assert sums.dtype == torch.float32
    assert largest_difference(sums, tokens.double().sum(1)) <= 1e-3


class LogitRows(TorchDispatchMode):
    """Records the most rows of any tensor of logits that an operation returns."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.ndim > 0 and x.shape[-1] == self.vocab and "aten.t." not in str(func):
                self.most = max(self.most, x.numel() // self.vocab)
        return out


@pytest.mark.parametrize("chunk_tokens", [3, 8, 1000])
def test_no_more_logits_than_a_chunk_exist_at_once(chunk_tokens: int) -> None:
    model = make_model("llama", vocab_size=97)
    batch = collate_pairs(PAIRS, pair_index=range(len(PAIRS)))
    n_targets = len(batch.target_ids)
    assert n_targets > 8
    with LogitRows(97) as logits:
        sequence_log_probs(model, batch, chunk_tokens=chunk_tokens).sum().backward()
    assert logits.most == min(chunk_tokens, n_targets)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_sliding_window_is_honoured_or_refused_but_never_ignored(family: str) -> None:
    model = make_model(family, torch.float32, "eager", sliding_window=6)
    inside, beyond = TokenizedPair([1, 3], [4, 5, 6, 7], [8, 9, 10]), TokenizedPair([1, 3, 4], [5, 6, 7, 8], [9])
    for layout in LAYOUTS:
        logps = sequence_log_probs(model, collate_pairs([inside], pair_index=[0], layout=layout))
        assert_close(logps.double(), reference_log_probs(model, [inside]), rtol=0, atol=1e-5)
    plain = sequence_log_probs(model, collate_pairs([inside, beyond], pair_index=[0, 1], layout="concatenated"))
    assert_close(plain.double(), reference_log_probs(model, [inside, beyond]), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="last 6 tokens"):
        sequence_log_probs(model, collate_pairs([inside, beyond], pair_index=[0, 1]))


def test_chunks_of_no_tokens_are_refused() -> None:
    hidden, weight, _, ids = head_inputs()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        token_log_probs(hidden, Unembedding(weight), ids, chunk_tokens=0)
