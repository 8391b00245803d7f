"""Branches against one run for each strength through ``steer`` and ``model.generate``."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiltmeter.models.test_generation import make_prompts, spelling
from tests.tiny_models import EOS, FAMILIES, WIDTH, make_model
from tiltmeter.errors import UserError
from tiltmeter.models.branch_attention import BRANCH_ATTENTION
from tiltmeter.models.generation import Completion, Decoding, generate
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM, backbone, decoder_blocks
from tiltmeter.pairs.branching import generate_branches
from tiltmeter.pairs.packing import use_packed_attention
from tiltmeter.steering.intervene import Intervention, steer

SITES = ("layer_00", "layer_01", FINAL_PRE_NORM, FINAL_POST_NORM)
STRENGTHS = (-3.0, 0.0, 1.0)
DIRECTION = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
GREEDY = Decoding(max_new_tokens=12)
SAMPLED = Decoding(max_new_tokens=8, temperature=1.3, top_p=0.9, n_samples=2)
WINDOW = 5
"""Shorter than most prompts, and than what is said."""
SLIDING = {family: {"sliding_window": WINDOW} for family in ("mistral", "gemma2")}
Said = list[list[list[Completion]]]


def make(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    return make_model(family, dtype, "eager" if family == "gemma2" else "sdpa", **changes)


def together(model: PreTrainedModel, decoding: Decoding = GREEDY, site: str = "layer_00", **options: Any) -> Said:
    settings: dict[str, Any] = {
        "prompts": make_prompts(),
        "shifts": torch.tensor(STRENGTHS)[:, None] * DIRECTION,
    } | options
    prompts = settings.pop("prompts")
    return generate_branches(model, spelling(), prompts, decoding, site=site, **settings)


def one_by_one(
    model: PreTrainedModel,
    decoding: Decoding = GREEDY,
    site: str = "layer_00",
    *,
    direction: Tensor = DIRECTION,
    strengths: tuple[float, ...] = STRENGTHS,
    **options: Any,
) -> Said:
    prompts = options.pop("prompts", make_prompts())
    said = []
    for strength in strengths:
        with steer(model, Intervention(site, direction[None], strength, tokens="new")):
            said.append(generate(model, spelling(), prompts, decoding, **options))
    return said


def ids_of(said: Said) -> list[list[list[tuple[int, ...]]]]:
    """Tokens, end tokens included, that comparing completions leaves out."""
    return [[[completion.ids for completion in samples] for samples in branch] for branch in said]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in FAMILIES), ("llama", torch.float64), ("gemma2", torch.float64)],
)
def test_greedy_tokens_are_those_of_one_run_a_strength(family: str, dtype: torch.dtype) -> None:
    prompts = make_prompts()
    if family == "gemma2" and dtype == torch.float64:  # model.generate is NaN for left-padded rows in float64
        prompts = [prompt[:7] for prompt in prompts if len(prompt) >= 7]
    model = make(family, dtype, **SLIDING.get(family, {}))
    for site in SITES if family == "llama" else SITES[::3]:
        expected = one_by_one(model, site=site, prompts=prompts)
        found = together(model, site=site, prompts=prompts)
        assert found == expected
        assert ids_of(found) == ids_of(expected)
        assert len({samples[0].text for branch in found for samples in branch}) > len(prompts), "no effect"


@pytest.mark.parametrize("site", ["layer_00", FINAL_POST_NORM])
def test_samples_are_those_of_one_run_a_strength(site: str) -> None:
    model = make("llama", torch.float64)
    keys = [f"pair/{i}" for i in range(len(make_prompts()))]
    found = together(model, SAMPLED, site, keys=keys, tokens_per_batch=300)
    assert found == one_by_one(model, SAMPLED, site, keys=keys)
    assert any(not completion.is_cut for branch in found for samples in branch for completion in samples)


@pytest.mark.parametrize(("family", "decoding"), [("llama", SAMPLED), ("gpt2", GREEDY), ("mistral", GREEDY)])
def test_the_last_token_of_a_prompt_can_be_steered_too(family: str, decoding: Decoding) -> None:
    """Prompts one by one, with a mask that begins there; one prompt is a single token, one alone in its batch."""
    model = make(family, torch.float64, **SLIDING.get(family, {}))
    prompts = [[7], *make_prompts()[:3]]
    keys = [str(i) for i in range(len(prompts))]
    for tokens_per_batch in (1, 16384) if family == "llama" else (16384,):
        options: dict[str, Any] = {
            "prompts": prompts,
            "keys": keys,
            "tokens": "predicting",
            "tokens_per_batch": tokens_per_batch,
        }
        found = together(model, decoding, **options)
        for branch, strength in zip(found, STRENGTHS, strict=True):
            for prompt, key, said in zip(prompts, keys, branch, strict=True):
                reached = torch.arange(len(prompt) + decoding.max_new_tokens)[None] >= len(prompt) - 1
                with steer(model, Intervention("layer_00", DIRECTION[None], strength, tokens=reached)):
                    assert said == generate(model, spelling(), [prompt], decoding, keys=[key])[0]
    assert ids_of(found) != ids_of(together(model, decoding, prompts=prompts, keys=keys)), "the first token is the same"


@pytest.mark.parametrize("tokens_per_batch", [1, 200, 500])
def test_branches_do_not_depend_on_the_batch_size(tokens_per_batch: int) -> None:
    model = make("qwen2", torch.float64)
    assert ids_of(together(model, tokens_per_batch=tokens_per_batch)) == ids_of(together(model))


def test_finished_branches_leave_the_batch() -> None:
    model = make("llama", torch.float64)
    calls: list[tuple[int, ...]] = []
    handle = backbone(model).register_forward_pre_hook(
        lambda _m, _args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    decoding = Decoding(max_new_tokens=40)
    towards_the_end = model.get_output_embeddings().weight[EOS].detach()
    strengths = (0.4, 0.8, 1.6, 2.4)
    found = together(
        model,
        decoding,
        FINAL_POST_NORM,
        shifts=torch.tensor(strengths)[:, None] * towards_the_end,
        tokens_per_batch=10**6,
    )
    handle.remove()
    assert found == one_by_one(model, decoding, FINAL_POST_NORM, direction=towards_the_end, strengths=strengths)
    lengths = torch.tensor([[samples[0].n_tokens for samples in branch] for branch in found]).T
    going = [lengths >= step for step in range(1, 40)]
    expected = [(int(some.any(1).sum()), int(some.any(0).sum())) for some in going if some.any()]
    assert calls == [(len(make_prompts()), max(len(prompt) for prompt in make_prompts())), *expected]
    assert len({rows for rows, _ in expected}) > 1
    assert len({branches for _, branches in expected}) > 1


def test_one_new_token_and_no_prompts_are_generated_alike() -> None:
    model = make("llama", torch.float64)
    assert together(model, Decoding(max_new_tokens=1)) == one_by_one(model, Decoding(max_new_tokens=1))
    assert together(model, prompts=[]) == [[] for _ in STRENGTHS]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_is_cut_where_no_room_is_left(family: str) -> None:
    limit = {"n_positions": 20} if family == "gpt2" else {"max_position_embeddings": 20}
    model = make(family, torch.float64, **limit)
    assert max(len(prompt) for prompt in make_prompts()) + GREEDY.max_new_tokens > 20
    assert together(model) == one_by_one(model)
    with pytest.raises(UserError, match="max_new_tokens: expected less than the model's 20"):
        together(model, Decoding(max_new_tokens=20))


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "packed"])
def test_branching_leaves_the_model_as_it_was(kernel: str) -> None:
    model = make_model("llama", attn="sdpa" if kernel == "packed" else kernel).train()
    if kernel == "packed":
        use_packed_attention(model)
    before, own = model.config._attn_implementation, model.generation_config
    assert together(model) == one_by_one(model)
    assert (model.config._attn_implementation, model.generation_config, model.training) == (before, own, True)
    assert before != BRANCH_ATTENTION

    def fail(*_: Any) -> None:
        if model.config._attn_implementation == BRANCH_ATTENTION:
            raise RuntimeError("stop")

    handle = decoder_blocks(model)[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        together(model)
    handle.remove()
    assert model.config._attn_implementation == before
    assert not any(block._forward_hooks for block in decoder_blocks(model))


def test_vectors_of_unfit_shape_are_refused() -> None:
    model = make("llama")
    with pytest.raises(UserError, match=f"expected width {WIDTH}"):
        together(model, shifts=torch.zeros(2, 7))
    with pytest.raises(UserError, match="finite"):
        together(model, shifts=torch.full((2, WIDTH), torch.nan))
    with pytest.raises(UserError, match="layer_07: this model has 2 blocks"):
        together(model, site="layer_07")


def test_attention_with_sinks_is_refused() -> None:
    """An option of the kernel that this one doesn't know must not be left out silently."""
    model = make("llama")
    attention = decoder_blocks(model)[0].self_attn
    plain = attention.forward
    attention.forward = lambda *args, **kwargs: plain(*args, **kwargs, s_aux=torch.zeros(4))
    with pytest.raises(UserError, match="s_aux"):
        together(model)
