"""Sweeps against one whole forward pass for each strength through ``steer``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from tests.tiny_models import FAMILIES, WIDTH, make_model, random_pairs
from tiltmeter.errors import UserError
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM, all_sites, decoder_blocks, final_norm
from tiltmeter.pairs.batch import CHOSEN, LAYOUTS, PAD, PROMPT, PreferenceBatch, TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import model_inputs
from tiltmeter.pairs.packing import use_packed_attention
from tiltmeter.steering.intervene import Intervention, steer
from tiltmeter.steering.sweep_logits import SteeredSums, steered_logits, steered_sums, sweep_cost

DEPTH = 3
SITES = (*all_sites(DEPTH), f"layer_{DEPTH - 1:02d}")
LAMBDAS = torch.tensor([-2.0, -0.3, 0.0, 1.0, 4.0], dtype=torch.float64)
DIRECTION = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda segments: segments != PAD,
    "new": lambda segments: segments >= CHOSEN,
    "prompt": lambda segments: segments == PROMPT,
}
WINDOWS: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 5}, "gemma2": {"sliding_window": 5}}


def make(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    depth = {"n_layer": DEPTH} if family == "gpt2" else {"num_hidden_layers": DEPTH}
    kernel = "eager" if family == "gemma2" else "sdpa"
    return make_model(family, dtype, kernel, **depth, **changes)


def make_shifts(dtype: torch.dtype = torch.float64) -> Tensor:
    return (LAMBDAS[:, None] * DIRECTION).to(dtype)


def make_batch(n: int = 3, **options: Any) -> PreferenceBatch:
    return collate_pairs(random_pairs(n, seed=2), pair_index=range(n), **({"layout": "concatenated"} | options))


def unpadded_batch() -> PreferenceBatch:
    """For eager attention in float64, which is NaN where rows are padded."""
    twice = [
        TokenizedPair([1, 5, 9, 30, 8], [7, 44, 2], [21, 3, 60]),
        TokenizedPair([1, 6, 6, 7, 50], [3, 3, 9], [9, 4, 2]),
    ]
    return collate_pairs(twice, pair_index=range(2), layout="concatenated")


@torch.no_grad()
def one_by_one(model: PreTrainedModel, batch: PreferenceBatch, site: str, tokens: Any = "all") -> Tensor:
    """One whole pass through the model for each strength."""
    if isinstance(tokens, str):
        tokens = MASKS[tokens](batch.segments)
    found = []
    for strength in LAMBDAS.tolist():
        with steer(model, Intervention(site, DIRECTION[None], strength, tokens=tokens)):
            found.append(model(**model_inputs(model, batch)).logits.flatten(0, 1)[batch.target_rows])
    return torch.stack(found)


def together(model: PreTrainedModel, batch: PreferenceBatch, **options: Any) -> Tensor:
    parts = list(steered_logits(model, batch, **options))
    assert torch.cat([part.targets for part in parts]).tolist() == list(range(len(batch.target_ids)))
    return torch.cat([part.logits for part in parts], dim=1)


def log_probs(model: PreTrainedModel, batch: PreferenceBatch, **options: Any) -> Tensor:
    return torch.cat([part.log_probs(batch) for part in steered_logits(model, batch, **options)], dim=1)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_are_those_of_one_pass_a_vector(family: str, site: str, dtype: torch.dtype) -> None:
    model, shifts = make(family, dtype, **WINDOWS.get(family, {})), make_shifts(dtype)
    batch = unpadded_batch() if family == "gemma2" and dtype == torch.float64 else make_batch()
    expected = one_by_one(model, batch, site)
    found = together(model, batch, site=site, shifts=shifts)
    exact = dtype == torch.float64
    assert_close(
        found, expected, rtol=1e-12 if exact else 1e-5, atol=1e-12 if exact else 1e-5 * expected.abs().max().item()
    )
    assert (found[0] - found[-1]).abs().max() > 0.1, "steering had no effect"


@pytest.mark.parametrize("tokens", ["all", "new", "prompt", "mask"])
@pytest.mark.parametrize("site", [FINAL_POST_NORM, FINAL_PRE_NORM, "layer_00"])
def test_which_tokens_are_reached(site: str, tokens: Any) -> None:
    model, batch, shifts = make("llama"), make_batch(4), make_shifts()
    some = torch.rand(batch.segments.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    wanted = some if tokens == "mask" else tokens
    expected = one_by_one(model, batch, site, wanted)
    assert_close(together(model, batch, site=site, shifts=shifts, tokens=wanted), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("site", [FINAL_POST_NORM, FINAL_PRE_NORM, "layer_00"])
def test_every_layout_and_any_cut_give_the_same(site: str, layout: str, packed: bool, n: int) -> None:
    model, shifts = make("llama"), make_shifts()
    batch = make_batch(n, layout=layout, packed=packed)
    if packed:
        use_packed_attention(model)
    expected = one_by_one(model, batch, site)
    for tokens_per_batch in (1, 3 * batch.segments.numel(), 10**6):
        found = together(model, batch, site=site, shifts=shifts, tokens_per_batch=tokens_per_batch)
        assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("site", SITES)
def test_zeros_leave_every_bit(site: str) -> None:
    model, batch = make("gpt2", torch.float32), make_batch()
    plain = together(model, batch, site=FINAL_POST_NORM, shifts=torch.zeros(1, WIDTH))
    assert torch.equal(together(model, batch, site=site, shifts=make_shifts(torch.float32))[2], plain[0])
    assert torch.equal(together(model, batch, site=site, shifts=torch.zeros(1, WIDTH)), plain)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_post_norm_is_a_logit_bias_before_scale_and_cap(family: str) -> None:
    model, batch, shifts = make(family), unpadded_batch(), make_shifts()
    logits = together(model, batch, site=FINAL_POST_NORM, shifts=shifts)
    config = model.config
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.atanh(logits / cap) * cap
    logits = logits / (getattr(config, "logit_scale", None) or 1.0)
    bias = shifts @ model.get_output_embeddings().weight.T
    assert_close(logits - logits[2], bias[:, None].expand_as(logits), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("site", [FINAL_POST_NORM, "layer_01"])
def test_log_probs_are_those_of_the_logits(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, shifts = make("llama"), make_batch(), make_shifts()
    logits = one_by_one(model, batch, site)
    expected = logits.log_softmax(-1).gather(-1, batch.target_ids.expand(len(shifts), -1)[..., None])[..., 0]
    assert_close(log_probs(model, batch, site=site, shifts=shifts), expected, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr("tiltmeter.steering.sweep_logits.default_chunk_tokens", lambda _: 11)
    parts = [len(part.targets) for part in steered_logits(model, batch, site=site, shifts=shifts)]
    assert set(parts[:-1]) == {2}, "11 rows of logits at a time for 5 shifts"
    assert_close(log_probs(model, batch, site=site, shifts=shifts), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("site", "expected"), [("layer_00", 1 + 4 * 2 / 3), ("layer_01", 1 + 4 / 3), ("layer_02", 1.0)]
)
def test_only_blocks_above_the_site_run_again(site: str, expected: float) -> None:
    model, batch, shifts = make("llama"), make_batch(), make_shifts()
    rows: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda _m, inputs: rows.append(len(inputs[0])))
        for block in decoder_blocks(model)
    ]
    log_probs(model, batch, site=site, shifts=shifts)
    for handle in handles:
        handle.remove()
    passes = sum(rows) / (DEPTH * len(batch.input_ids))
    assert passes == pytest.approx(expected)
    assert passes == pytest.approx(sweep_cost(DEPTH, int(site[-2:]), len(shifts) - 1)), "0 is free"


def test_hooks_are_gone_after_an_error() -> None:
    model, batch = make("llama"), make_batch()
    final_norm(model).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        log_probs(model, batch, site="layer_00", shifts=make_shifts())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in decoder_blocks(model))


def fail(*_: Any) -> None:
    raise RuntimeError("stop")


def test_vectors_of_another_model_are_one_line() -> None:
    model, batch = make("llama"), make_batch()
    with pytest.raises(UserError, match="layer_07: this model has 3 blocks"):
        log_probs(model, batch, site="layer_07", shifts=make_shifts())
    with pytest.raises(UserError, match=f"width {WIDTH}.*got.* 7"):
        log_probs(model, batch, site="layer_00", shifts=torch.zeros(2, 7))
    with pytest.raises(UserError, match="finite"):
        log_probs(model, batch, site="layer_00", shifts=torch.full((2, WIDTH), torch.inf))


def test_tokens_that_do_not_exist_are_refused() -> None:
    model, batch = make("llama"), make_batch()
    with pytest.raises(UserError, match="expected all, new, prompt or a mask, got 'nwe'"):
        log_probs(model, batch, site="layer_00", shifts=make_shifts(), tokens="nwe")
    with pytest.raises(ValueError, match=r"a mask of \[1, 2\]"):
        log_probs(model, batch, site="layer_00", shifts=make_shifts(), tokens=torch.ones(1, 2, dtype=torch.bool))


def summed(model: PreTrainedModel, batch: PreferenceBatch, goal: Tensor, **options: Any) -> SteeredSums:
    parts = list(steered_sums(model, batch, goal_logits=lambda some: goal[some], **options))
    return SteeredSums(*(torch.cat(columns, dim=-1) for columns in zip(*parts, strict=True)))


@pytest.mark.parametrize("size", [1e-3, 1.0, 60.0], ids=["small", "usual", "far"])
@pytest.mark.parametrize("site", [FINAL_POST_NORM, FINAL_PRE_NORM, "layer_00"])
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float64), ("cohere", torch.float32), ("gemma2", None)])
def test_sums_are_those_of_the_logits(
    family: str, dtype: torch.dtype | None, site: str, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs and KL by log_softmax of each vector's logits in float64; far vectors leave next to nothing of what was likely."""
    monkeypatch.setattr("tiltmeter.steering.sweep_logits._HIDDEN_AT_A_TIME", 2 * WIDTH * 60)
    model, batch = make(family, dtype or torch.float32), make_batch(4)
    shifts = (size * make_shifts()).to(dtype or torch.float32)
    goal = 3 * torch.randn(len(batch.target_ids), model.config.vocab_size, generator=torch.Generator().manual_seed(4))
    found = summed(model, batch, goal, site=site, shifts=shifts, tokens="new")
    logits = together(model, batch, site=site, shifts=shifts, tokens="new").double().log_softmax(-1)
    q, p = goal.double().log_softmax(-1), logits[2]
    exact = dtype == torch.float64
    close = {"rtol": 1e-9, "atol": 1e-9} if exact else {"rtol": 1e-4, "atol": 2e-5}
    ids = batch.target_ids.expand(len(shifts), -1)[..., None]
    assert_close(found.log_probs, logits.gather(-1, ids)[..., 0], **close)
    assert_close(found.kl_from_goal, (q.exp() * (q - logits)).sum(-1), **close)
    assert_close(found.kl_from_start, (p.exp() * (p - logits)).sum(-1), **close)
    assert found.targets.tolist() == list(range(len(batch.target_ids)))
