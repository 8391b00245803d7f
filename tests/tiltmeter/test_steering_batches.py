"""Batches of unequal rows under steering: padding, masks, packed rows, and what does not fit."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.tiltmeter.steered import STRONG, direction, prompts, states_of
from tests.tiny_models import make_model, make_tokenizer, random_pairs
from tiltmeter.models.generation import Decoding, generate
from tiltmeter.models.layers import backbone
from tiltmeter.pairs.batch import PAD as PAD_SEGMENT
from tiltmeter.pairs.batch import PROMPT, Layout, collate_pairs
from tiltmeter.pairs.log_probs import run_backbone, sequence_log_probs
from tiltmeter.pairs.packing import use_packed_attention
from tiltmeter.steering.intervene import Intervention, steer


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("tokens", ["all", "prompt", "mask"])
def test_padding_is_never_touched(tokens: str, left: bool) -> None:
    model, v = make_model("gpt2", torch.float64), direction()
    ids, mask = prompts(left=left)
    chosen = torch.ones(1, ids.shape[1], dtype=torch.bool) if tokens == "mask" else tokens
    before = states_of(model, ids, mask)
    with steer(model, Intervention("layer_00", v, tokens=chosen), prompt_width=ids.shape[1]):
        after = states_of(model, ids, mask)
    is_real = mask == 1
    assert torch.equal(after[~is_real], before[~is_real])
    assert_close(after[is_real], before[is_real] + v, rtol=0, atol=1e-14)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mask_given_by_place_is_seen_as_one_given_by_name(family: str) -> None:
    model, v = make_model(family, torch.float64), direction()
    ids, mask = prompts()
    base = backbone(model)
    args = {"llama": (ids, mask), "gpt2": (ids, None, mask)}[family]
    with torch.no_grad(), steer(model, Intervention("final_post_norm", v)):
        by_place = base(*args, use_cache=False).last_hidden_state
        by_name = base(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        unmasked = base(ids, use_cache=False).last_hidden_state
    assert torch.equal(by_place, by_name)
    assert not torch.equal(by_place, unmasked)
    before = base(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.equal(by_place[mask == 0], before[mask == 0])


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated", "chosen_only"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_rows_are_steered_as_padded_ones(family: str, layout: Layout) -> None:
    pairs, v = random_pairs(4, seed=2), direction()
    model = make_model(family, torch.float64)
    use_packed_attention(model)
    by_side: list[tuple[Tensor, Tensor]] = []
    for packed in (False, True):
        batch = collate_pairs(pairs, pair_index=range(4), layout=layout, packed=packed)
        plain = sequence_log_probs(model, batch)
        for tokens in (batch.segments != PAD_SEGMENT, (batch.segments != PAD_SEGMENT) & (batch.segments != PROMPT)):
            with steer(model, Intervention("layer_00", v, STRONG, tokens=tokens)):
                by_side.append((sequence_log_probs(model, batch), plain))
    for i in range(2):
        assert_close(by_side[i], by_side[i + 2], rtol=0, atol=1e-10 if family == "gpt2" else 1e-4)
        assert (by_side[i][0] - by_side[i][1]).abs().min() > 1e-3
    assert (by_side[0][0] - by_side[1][0]).abs().max() > 1e-3


def test_where_padding_cannot_be_known_a_mask_is_asked_for() -> None:
    model, v = make_model("llama"), direction()
    batch = collate_pairs(random_pairs(3), pair_index=range(3), layout="shared_prefix")
    with steer(model, Intervention("layer_00", v)), pytest.raises(ValueError, match="give tokens as a mask"):
        run_backbone(model, batch)
    packed = collate_pairs(random_pairs(3), pair_index=range(3), packed=True)
    use_packed_attention(model)
    with steer(model, Intervention("layer_00", v)):
        run_backbone(model, packed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": torch.ones(2)}, "coefficients: 2 rows, each for 1 of the model's, which has 3"),
        ({"coefficients": torch.ones(3, 4, 1)}, "coefficients of 4 tokens in a pass of 6"),
        ({"tokens": torch.ones(2, 6, dtype=torch.bool)}, "the mask of tokens: 2 rows, each for 1"),
        ({"tokens": torch.ones(3, 5, dtype=torch.bool)}, "the mask of tokens has 5 tokens, the pass reaches token 6"),
    ],
)
def test_what_does_not_fit_the_batch_is_refused(options: dict[str, Any], message: str) -> None:
    model = make_model("llama", torch.float64)
    ids, mask = prompts()
    with steer(model, Intervention("layer_00", direction(), **options)), pytest.raises(ValueError, match=message):
        model(input_ids=ids, attention_mask=mask)


def test_the_projects_own_generation_is_steered_batch_by_batch() -> None:
    tokenizer = make_tokenizer()
    model = make_model("llama", torch.float64, vocab_size=len(tokenizer))
    texts = [tokenizer(text)["input_ids"] for text in ("tea", "rain and maps", "kind seven")]
    decoding = Decoding(max_new_tokens=5)
    v = direction()
    plain = generate(model, tokenizer, texts, decoding)
    with steer(model, Intervention("layer_00", v, STRONG, tokens="new")):
        together = generate(model, tokenizer, texts, decoding)
        alone = generate(model, tokenizer, texts, decoding, tokens_per_batch=1)
    assert together == alone
    assert together != plain
    with steer(model, Intervention("layer_00", v, 0.0, tokens="new")):
        assert generate(model, tokenizer, texts, decoding) == plain
