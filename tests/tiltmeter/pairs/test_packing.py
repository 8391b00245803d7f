"""Packed rows: the numbers of one sequence at a time, and nothing seen across documents."""

import pickle
import re

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.integrations.sdpa_attention import repeat_kv

from tests.tiny_models import FAMILIES, largest_difference, make_model, random_pairs, reference_log_probs
from tiltmeter.errors import UserError
from tiltmeter.pairs import packing as packing_module
from tiltmeter.pairs.batch import PAD, Layout, TokenizedPair, collate_pairs, packed_length
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.pairs.packing import PACKED_ATTENTION, Packing, Segments, packed_attention, use_packed_attention
from tiltmeter.pairs.verification import settle_packing

LAYOUTS: tuple[Layout, ...] = ("shared_prefix", "concatenated", "chosen_only")
PACKABLE = tuple(family for family in FAMILIES if family != "gemma2")

documents = st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple), min_size=1, max_size=4).map(tuple)


def packed_model(family: str, dtype: torch.dtype = torch.float64, **options: object) -> torch.nn.Module:
    model = make_model(family, dtype, **options)  # type: ignore[arg-type]
    use_packed_attention(model)
    return model


def test_a_packed_batch_is_one_row_without_padding() -> None:
    pairs = [TokenizedPair([1, 5], [6, 2], [7]), TokenizedPair([3], [8], [9, 4])]
    batch = collate_pairs(pairs, pair_index=[4, 2], packed=True)
    assert batch.input_ids.tolist() == [[1, 5, 6, 2, 7, 3, 8, 9, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    assert batch.target_rows.tolist() == [1, 2, 1, 5, 5, 7]
    assert batch.target_ids.tolist() == [6, 2, 7, 8, 9, 4]
    assert batch.target_sequences.tolist() == [0, 0, 2, 1, 3, 3]
    assert not (batch.segments == PAD).any()
    assert batch.packing is not None
    assert batch.packing.documents == ((2, 2, 1), (1, 1, 2))
    assert batch.packing.last_position == 3
    concatenated = collate_pairs(pairs, pair_index=[4, 2], packed=True, layout="concatenated")
    assert concatenated.input_ids.tolist() == [[1, 5, 6, 2, 3, 8, 1, 5, 7, 3, 9, 4]], "chosen rows first"
    for layout, row in (("shared_prefix", batch), ("concatenated", concatenated)):
        assert sum(packed_length(pair, layout) for pair in pairs) == row.input_ids.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", PACKABLE)
def test_packed_log_probs_are_those_of_one_sequence_at_a_time(family: str, layout: Layout) -> None:
    pairs = random_pairs(7, seed=3)
    model = packed_model(family)
    truth = reference_log_probs(model, pairs)[: 7 if layout == "chosen_only" else 14]
    batch = collate_pairs(pairs, pair_index=range(7), layout=layout, packed=True)
    assert largest_difference(truth, sequence_log_probs(model, batch)) < (1e-10 if family == "gpt2" else 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_packed_gradients_are_those_of_padded_rows(family: str) -> None:
    pairs = random_pairs(6, seed=1)
    gradients = []
    for packed in (False, True):
        model = packed_model(family)
        batch = collate_pairs(pairs, pair_index=range(6), packed=packed)
        (sequence_log_probs(model, batch) * torch.linspace(-1, 1, 12)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert max(g.abs().max().item() for g in gradients[0].values()) > 1e-2
    assert_close(gradients[1], gradients[0], rtol=0, atol=1e-10 if family == "gpt2" else 2e-5)


def test_changing_one_pair_leaves_the_others_untouched_to_the_last_bit() -> None:
    pairs = random_pairs(5, seed=2)
    model = packed_model("llama", torch.float32)
    other = TokenizedPair(*[[(token + 7) % 60 + 3 for token in ids] for ids in pairs[2]])
    changed = [other if i == 2 else pair for i, pair in enumerate(pairs)]
    with torch.no_grad():
        before, after = (
            sequence_log_probs(model, collate_pairs(some, pair_index=range(5), packed=True))
            for some in (pairs, changed)
        )
    differs = before != after
    assert differs.nonzero()[:, 0].tolist() == [2, 7], "chosen and rejected of the third pair, nothing else"


@given(documents)
def test_segments_list_the_keys_that_the_masks_show(documents: tuple[tuple[int, ...], ...]) -> None:
    packing = Packing(documents)
    seen = torch.block_diag(*[mask.isfinite().double() for mask in packing.masks(torch.device("cpu"), torch.float64)])
    segments = packing.segments(torch.device("cpu"))
    by_segment = torch.zeros_like(seen)
    queries, keys = segments.cumulative_queries.tolist(), segments.cumulative_keys.tolist()
    for s in range(len(queries) - 1):
        index = segments.key_index[keys[s] : keys[s + 1]]
        n = queries[s + 1] - queries[s]
        for at in range(n):
            by_segment[queries[s] + at, index[: len(index) - n + at + 1]] = 1
    assert torch.equal(by_segment, seen)
    assert segments.longest_query == max(n for document in documents for n in document)


def in_turn(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, *_: int, scale: float, **options: object
) -> Tensor:
    """What a variable-length kernel computes: each segment by itself, causal from the bottom right."""
    assert options == {"window_size": (-1, 0), "enable_gqa": True}
    attended = []
    for s in range(len(queries) - 1):
        q = rearrange(query[queries[s] : queries[s + 1]], "token head d -> 1 head token d")
        stretch = slice(int(keys[s]), int(keys[s + 1]))
        k, v = (
            repeat_kv(rearrange(x[stretch], "token head d -> 1 head token d"), query.shape[1] // key.shape[1])
            for x in (key, value)
        )
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        attended.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1))
    return torch.cat(attended)


def test_attention_by_segment_is_attention_by_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "varlen_attn", in_turn)
    packing = Packing(((4, 2, 3), (1, 5), (2, 1, 1)))
    n_tokens = sum(packing.sizes)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, n_tokens, 8, dtype=torch.float64) for heads in (4, 2, 2))
    by_document, _ = packed_attention(torch.nn.Module(), query, key, value, None, packing=packing, scaling=0.3)
    segments: Segments = packing.segments(torch.device("cpu"))
    by_segment = packing_module._by_segment(query, key, value, segments, 0.3)
    assert_close(by_segment, by_document, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_the_variable_length_kernel_agrees_with_masked_attention_on_a_gpu() -> None:
    packing = Packing(((40, 20, 30), (1, 50), (20, 1, 1)))
    torch.manual_seed(0)
    shapes = [(1, heads, sum(packing.sizes), 64) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    results = []
    for attend in (
        lambda: packing_module._by_segment(*inputs, packing.segments(inputs[0].device), 0.125),
        lambda: packing_module._by_document(*inputs, packing, 0.125),
    ):
        attended = attend()
        results.append([attended, *torch.autograd.grad(attended.float().square().sum(), inputs)])
    assert_close(results[0], results[1], rtol=2e-2, atol=2e-2)


def test_generation_and_plain_forwards_are_untouched_by_the_packed_kernel() -> None:
    ids = torch.tensor([[0, 0, 1, 5, 9], [1, 4, 6, 8, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    plain, packed = make_model("llama"), packed_model("llama", torch.float32)
    logits = [model(input_ids=ids, attention_mask=mask).logits[mask == 1] for model in (plain, packed)]
    assert_close(logits[0], logits[1], rtol=0, atol=0)
    tokens = [
        model.eval().generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False) for model in (plain, packed)
    ]
    assert torch.equal(tokens[0], tokens[1])


def test_packing_is_refused_where_it_would_change_the_numbers() -> None:
    eager = make_model("llama", attn="eager")
    with pytest.raises(UserError, match=r"packed=true needs attn_implementation=sdpa, got eager"):
        settle_packing(eager, "shared_prefix", True, max_length=100)
    assert settle_packing(eager, "shared_prefix", None, max_length=100) is False
    narrow = make_model("mistral", sliding_window=8)
    batch = collate_pairs([TokenizedPair([3] * 7, [4, 5], [6])], pair_index=[0], packed=True)
    assert settle_packing(narrow, "concatenated", None, max_length=9) is False
    assert narrow.config._attn_implementation == "sdpa"
    use_packed_attention(narrow)
    with pytest.raises(UserError, match=re.escape("this model sees only the last 8 tokens and a pair is longer")):
        sequence_log_probs(narrow, batch)
    query = torch.ones(1, 1, 2, 4)
    for option in ({"softcap": 5.0}, {"dropout": 0.1}, {"s_aux": query}):
        with pytest.raises(ValueError, match="packed attention does not support"):
            packed_attention(torch.nn.Module(), query, query, query, None, packing=Packing(((1, 1),)), **option)


@pytest.mark.parametrize("family", PACKABLE)
def test_packing_is_chosen_where_nothing_is_said_and_the_model_can(family: str) -> None:
    model = make_model(family)
    assert settle_packing(model, "shared_prefix", None, max_length=100) is True
    assert model.config._attn_implementation == PACKED_ATTENTION
    model = make_model(family)
    assert settle_packing(model, "shared_prefix", False, max_length=100) is False
    assert model.config._attn_implementation == "sdpa"


def test_a_family_that_ignores_the_packing_is_left_in_rows() -> None:
    model = make_model("llama")
    for layer in model.model.layers:  # an attention that makes up its own mind
        own = layer.self_attn.forward

        def deaf(*args: object, own: object = own, packing: object = None, **options: object) -> object:
            return own(*args, **options)  # type: ignore[operator]

        layer.self_attn.forward = deaf
    assert settle_packing(model, "shared_prefix", None, max_length=100) is False
    with pytest.raises(UserError, match=r"its attention can't be packed: set packed=false"):
        settle_packing(model, "shared_prefix", True, max_length=100)


def test_a_packing_survives_being_sent_to_a_worker() -> None:
    packing = Packing(((2, 1, 3),))
    packing.masks(torch.device("cpu"), torch.float32)
    assert pickle.loads(pickle.dumps(packing)).documents == packing.documents
