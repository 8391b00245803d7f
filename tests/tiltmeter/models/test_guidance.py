"""Two models decoded as one: exact at w = 0 and w = 1, token by token against whole passes in between, behind other prompts."""

import pytest
import torch

from tests.tiny_models import BOS, make_model, make_tokenizer
from tiltmeter.models.generation import Decoding, generate
from tiltmeter.models.guidance import Guide, guided

TOKENIZER = make_tokenizer()
PROMPTS = [[BOS, 70, 71, 72], [BOS, 80], [BOS, *range(90, 99)]]
TEN = Decoding(max_new_tokens=10)


def models(family: str) -> list[torch.nn.Module]:
    return [make_model(family, torch.float64, seed=seed, vocab_size=len(TOKENIZER)).eval() for seed in (0, 1)]


def ids_of(completions: object) -> list[tuple[int, ...]]:
    return [of[0].ids for of in completions]  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("decoding", [TEN, Decoding(max_new_tokens=10, temperature=1.0)], ids=["greedy", "sampled"])
def test_weight_0_is_the_model_and_weight_1_the_other(family: str, decoding: Decoding) -> None:
    one, other = models(family)
    for weight, alone in ((0.0, one), (1.0, other)):
        found = ids_of(generate(one, TOKENIZER, PROMPTS, decoding, guide=Guide(other, weight)))
        assert found == ids_of(generate(alone, TOKENIZER, PROMPTS, decoding))
    assert ids_of(generate(one, TOKENIZER, PROMPTS, decoding)) != ids_of(generate(other, TOKENIZER, PROMPTS, decoding))


def test_every_token_is_the_likeliest_of_the_mixed_logits_of_whole_passes() -> None:
    one, other = models("llama")
    principle, weight = [BOS, 100, 101, 102], 2.5
    own = [[*principle, *prompt[1:]] for prompt in PROMPTS]
    found = ids_of(generate(one, TOKENIZER, PROMPTS, TEN, guide=Guide(other, weight, own)))
    for prompt, begin, said in zip(PROMPTS, own, found, strict=True):
        assert said
        for n, token in enumerate(said):
            with torch.no_grad():
                z, z_other = (
                    model(input_ids=torch.tensor([[*before, *said[:n]]]), use_cache=False).logits[0, -1]
                    for model, before in ((one, prompt), (other, begin))
                )
            assert int((z + weight * (z_other - z)).argmax()) == token


def test_mixed_logits_are_those_of_the_product_of_powers() -> None:
    z, other = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed = guided(z, other, 0.3).softmax(-1)
    by_hand = z.softmax(-1) ** 0.7 * other.softmax(-1) ** 0.3
    torch.testing.assert_close(mixed, by_hand / by_hand.sum())
    assert guided(z, other, 1.0) is other
    torch.testing.assert_close(guided(z, other, 0.0), z, rtol=0, atol=0)
