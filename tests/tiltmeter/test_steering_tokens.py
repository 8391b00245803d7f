"""Which tokens are steered: prompts and new ones, with a cache and without, in beams and branches."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from tests.tiltmeter.steered import SITES, STRONG, direction, prompts
from tests.tiny_models import EOS, LAYERS, PAD, make_model
from tiltmeter.models.layers import backbone
from tiltmeter.steering.intervene import Intervention, steer

N_NEW = 7


def spoken(model: PreTrainedModel, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """New tokens, greedily."""
    cache = {"past_key_values": options.pop("past_key_values", None)}
    config = GenerationConfig(
        max_new_tokens=N_NEW, min_new_tokens=N_NEW, do_sample=False, pad_token_id=PAD, **({"use_cache": True} | options)
    )
    return model.eval().generate(input_ids=ids, attention_mask=mask, generation_config=config, **cache)[
        :, ids.shape[1] :
    ]


def spoken_by_hand(
    model: PreTrainedModel, ids: list[int], v: Tensor, strength: float, site: str, tokens: str
) -> list[int]:
    """One row without padding, cache or hooks of ours: every step computes the sequence again and adds v to a slice."""
    depth, width = SITES.index(site), len(ids)
    first, end = {"all": (0, None), "new": (width, None), "prompt": (0, width)}[tokens]

    def shift(hidden: Tensor) -> Tensor:
        moved = hidden.clone()
        moved[:, first:end] += strength * v[0]
        return moved

    def on_output(_m: Any, _i: Any, output: Any) -> Any:
        return (shift(output[0]), *output[1:]) if isinstance(output, tuple) else shift(output)

    base = backbone(model)
    norm = base.norm if hasattr(base, "norm") else base.ln_f
    block = (base.layers if hasattr(base, "layers") else base.h)[min(depth, LAYERS - 1)]
    with (norm if site == "final_post_norm" else block).register_forward_hook(on_output), torch.no_grad():
        for _ in range(N_NEW):
            logits = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits[EOS] = -torch.inf
            ids = [*ids, int(logits.argmax())]
    return ids[width:]


@pytest.mark.parametrize("tokens", ["all", "new", "prompt"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere"])
def test_generation_with_cache_and_left_padding_is_that_of_each_prompt_recomputed(
    family: str, site: str, tokens: str
) -> None:
    model, v = make_model(family, torch.float64), direction()
    ids, mask = prompts()
    strengths = torch.tensor([0.0, STRONG, -STRONG])
    with steer(model, Intervention(site, v, strengths, tokens=tokens)):
        together = spoken(model, ids, mask)
    for row in range(3):
        own = ids[row, mask[row] == 1].tolist()
        assert together[row].tolist() == spoken_by_hand(model, own, v, float(strengths[row]), site, tokens)
    assert torch.equal(together[0], spoken(model, ids, mask)[0])


def test_gemma2_in_float32_is_steered_the_same_way() -> None:
    model, v = make_model("gemma2", attn="eager"), direction().float()
    ids, mask = prompts()
    with steer(model, Intervention("layer_00", v, STRONG, tokens="new")):
        together = spoken(model, ids, mask)
    for row in range(3):
        assert together[row].tolist() == spoken_by_hand(
            model, ids[row, mask[row] == 1].tolist(), v, STRONG, "layer_00", "new"
        )


def test_choices_of_tokens_differ_and_the_first_new_token_is_the_prompts() -> None:
    model, v = make_model("llama", torch.float64), direction()
    ids, mask = prompts()
    found = {"none": spoken(model, ids, mask)}
    for tokens in ("all", "new", "prompt"):
        with steer(model, Intervention("final_post_norm", v, STRONG, tokens=tokens)):
            found[tokens] = spoken(model, ids, mask)
    assert torch.equal(found["new"][:, 0], found["none"][:, 0])
    assert len({tuple(x.flatten().tolist()) for x in found.values()}) == 4


@pytest.mark.parametrize("tokens", ["new", "prompt"])
def test_without_a_cache_the_width_of_the_prompt_tells(tokens: str) -> None:
    model, v = make_model("llama", torch.float64), direction()
    ids, mask = prompts()
    intervention = Intervention("layer_00", v, STRONG, tokens=tokens)
    with steer(model, intervention):
        expected = spoken(model, ids, mask)
    with steer(model, intervention, prompt_width=ids.shape[1]):
        assert torch.equal(spoken(model, ids, mask, use_cache=False), expected)
        assert torch.equal(spoken(model, ids, mask), expected), "and with one says the same"
    with steer(model, intervention), pytest.raises(ValueError, match=f"tokens={tokens}: .* say prompt_width"):
        spoken(model, ids, mask, use_cache=False)


def test_several_generations_in_one_with_have_each_their_own_prompt() -> None:
    model, v = make_model("llama", torch.float64), direction()
    calls = [prompts(), prompts((2, 4)), prompts((8, 8, 8, 1))]
    intervention = Intervention("layer_00", v, STRONG, tokens="new")
    alone = []
    for ids, mask in calls:
        with steer(model, intervention):
            alone.append(spoken(model, ids, mask))
    with steer(model, intervention):
        for (ids, mask), expected in zip(calls, alone, strict=True):
            assert torch.equal(spoken(model, ids, mask), expected)


@pytest.mark.parametrize("n_returned", [1, 2])
def test_beams_have_the_coefficients_of_their_prompt(n_returned: int) -> None:
    model, v = make_model("llama", torch.float64), direction()
    ids, mask = prompts()
    strengths = torch.tensor([0.0, STRONG, -STRONG])
    options = {"num_beams": 3, "num_return_sequences": n_returned}
    with steer(model, Intervention("layer_00", v, strengths), rows_per_coefficient=3):
        together = spoken(model, ids, mask, **options)
    for row in range(3):
        with steer(model, Intervention("layer_00", v, float(strengths[row]))):
            alone = spoken(model, ids[[row]], mask[[row]], **options)
        assert torch.equal(together[row * n_returned : (row + 1) * n_returned], alone)
    with steer(model, Intervention("layer_00", v, strengths)), pytest.raises(ValueError, match="coefficients: 3 rows"):
        spoken(model, ids, mask, **options)


def test_a_mask_says_which_tokens_through_prompt_and_cache_and_beams() -> None:
    model, v = make_model("llama", torch.float64), direction()
    ids, mask = prompts()
    width = ids.shape[1]
    as_mask = torch.zeros(1, width + N_NEW, dtype=torch.bool)
    as_mask[:, width:] = True
    for options, copies in (({}, 1), ({"num_beams": 2}, 2)):
        with steer(model, Intervention("layer_00", v, STRONG, tokens="new")):
            expected = spoken(model, ids, mask, **options)
        for rows in (1, 3):
            by_mask = Intervention("layer_00", v, STRONG, tokens=as_mask.expand(rows, -1))
            with steer(model, by_mask, rows_per_coefficient=copies):
                assert torch.equal(spoken(model, ids, mask, **options), expected)
    short = Intervention("layer_00", v, STRONG, tokens=as_mask[:, : width + 1])
    with steer(model, short), pytest.raises(ValueError, match=f"mask of tokens has {width + 1} tokens, .* {width + 2}"):
        spoken(model, ids, mask)


def test_a_static_cache_is_steered_like_a_growing_one() -> None:
    model, v = make_model("llama", torch.float64), direction()
    ids, mask = prompts()
    intervention = Intervention("layer_00", v, STRONG, tokens="new")
    with steer(model, intervention):
        expected = spoken(model, ids, mask)
        cache = StaticCache(model.config, max_cache_len=32)
        assert torch.equal(spoken(model, ids, mask, disable_compile=True, past_key_values=cache), expected)


def test_branches_of_one_row_have_their_own_coefficients_at_every_step() -> None:
    """The prompt's keys and values once, then for each λ one token a step, which sees the prompt and its own branch."""
    model, v = make_model("llama", torch.float64).eval(), direction()
    ids = prompts((5,))[0]
    lambdas = torch.tensor([0.0, STRONG, -STRONG], dtype=torch.float64)
    n = len(lambdas)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:]
        token, said = logits.argmax(-1).expand(1, n), []
        seen = torch.zeros(n, 0, dtype=torch.bool)
        with steer(model, Intervention("layer_00", v, lambdas[None, :, None], tokens="new")):
            for step in range(N_NEW):
                said.append(token)
                seen = torch.cat([seen, torch.eye(n, dtype=torch.bool)], 1)
                visible = torch.cat([torch.ones(n, 5, dtype=torch.bool), seen], 1)[None, None]
                at = torch.full((1, n), 5 + step)
                out = model(input_ids=token, position_ids=at, attention_mask=visible, past_key_values=cache)
                token = out.logits.argmax(-1)
    for branch, strength in enumerate(lambdas):
        with steer(model, Intervention("layer_00", v, float(strength), tokens="new")):
            alone = spoken(model, ids, torch.ones_like(ids))
        assert torch.equal(torch.cat(said)[:, branch], alone[0])
