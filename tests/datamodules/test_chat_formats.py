"""Dialogues in the chat templates of published families: what is prompt, what is trained, where a turn ends."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from datamodules.preference import PreferenceDataModule
from datamodules.records import Message, PreferencePair, transcript
from datamodules.tokenization import PairTokenizer
from launch.screen import data_table
from tests.chat_templates import FAMILIES, tokenizer_of
from tests.tiny_models import MemorySource
from tiltmeter.errors import UserError
from tiltmeter.models.generation import Decoding, generate
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.pairs.chat import end_of_turn_id, settle_text_format

HISTORY = (Message("user", "Hi"), Message("assistant", "<think>\nhm\n</think>\n\nHello."), Message("user", " Sky? "))


def pair_of(prompt: tuple[Message, ...], chosen: str = "Blue.", rejected: str = "Green.") -> PreferencePair:
    (text, a), (_, b) = transcript(prompt, chosen), transcript(prompt, rejected)
    sides = Message("assistant", chosen), Message("assistant", rejected)
    return PreferencePair("test/1", "test", "1", prompt, *sides, text, a, b)


def ids_of(name: str, pair: PreferencePair) -> TokenizedPair:
    return PairTokenizer(tokenizer_of(name), 512, text_format="chat_template")([pair])[1][0]


@pytest.mark.parametrize("name", FAMILIES)
def test_responses_end_with_the_token_that_ends_a_turn_and_follow_one_prompt(name: str) -> None:
    tokenizer, end = tokenizer_of(name), FAMILIES[name].end
    ids = ids_of(name, pair_of(HISTORY))
    for response, words in ((ids.chosen_ids, "Blue."), (ids.rejected_ids, "Green.")):
        said = tokenizer.decode(response)
        assert said.endswith(words + end)
        assert said.count(end) == 1
    whole = tokenizer.decode([*ids.prompt_ids, *ids.chosen_ids])
    assert whole.count("Sky?") == whole.count("Blue.") == 1


@pytest.mark.parametrize(
    ("name", "prompt", "response"),
    [
        (
            "ChatML",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
            " Blue. ",
        ),
        ("Llama 3", "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>", "Blue."),
        ("Gemma", "<s><start_of_turn>user\nHi<end_of_turn>\n", "Blue."),
        ("Mistral", "<s>[INST] Hi [/INST]", "  Blue. "),
        ("Qwen 3", "<|im_start|>user\nHi<|im_end|>\n", "<think>\n\n</think>\n\n Blue. "),
        ("DeepSeek R1", "<s><|User|>Hi<|Assistant|>", " Blue. "),
    ],
)
def test_system_prompts_white_space_and_thinking_are_the_template_s(name: str, prompt: str, response: str) -> None:
    tokenizer = tokenizer_of(name)
    ids = ids_of(name, pair_of((Message("user", "Hi"),), " Blue. ", " Green. "))
    assert tokenizer.decode(ids.prompt_ids).startswith(prompt)
    assert "<think>" not in tokenizer.decode(ids.prompt_ids), "a dialogue without thoughts doesn't go on from one"
    assert tokenizer.decode(ids.chosen_ids) == response + FAMILIES[name].end


def test_a_system_turn_that_a_template_refuses_is_one_line() -> None:
    with pytest.raises(UserError, match=r"System role not supported.*pair test/1"):
        ids_of("Gemma", pair_of((Message("system", "Be kind."), Message("user", "Hi"))))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_is_taken_where_the_model_stops_at_its_end_of_turn(name: str) -> None:
    tokenizer = tokenizer_of(name)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    assert end_of_turn_id(tokenizer) == end
    assert settle_text_format("auto", tokenizer, [7, end])[0] == "chat_template"
    if end != tokenizer.eos_token_id:
        choice, why = settle_text_format("auto", tokenizer, [tokenizer.eos_token_id])
        assert (choice, FAMILIES[name].end in why) == ("transcript", True), (
            "a base model with its chat model's tokenizer"
        )


def test_the_choice_is_printed_with_its_reason() -> None:
    data = PreferenceDataModule(MemorySource(8), train_pairs=4, val_pairs=2, probe_pairs=0)
    data.load()
    data.tokenize(tokenizer_of("Llama 3"), [tokenizer_of("Llama 3").convert_tokens_to_ids("<|eot_id|>")])
    assert data.written_as == ("chat_template", "the model stops at <|eot_id|>, which ends its turns")
    cells = [str(cell) for cell in data_table(data, "given").columns[2].cells]
    assert "chat_template: the model stops at <|eot_id|>, which ends its turns" in cells


@pytest.mark.parametrize(
    "named", [None, [7]], ids=["the model's file names EOS alone", "the model's file names another"]
)
@pytest.mark.parametrize("name", ["Llama 3", "Gemma", "Qwen 3"])
def test_generation_stops_at_the_end_of_a_turn(name: str, named: list[int] | None) -> None:
    tokenizer = tokenizer_of(name)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))  # type: ignore[arg-type]
    model.generation_config = GenerationConfig(eos_token_id=named)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.lm_head.register_forward_hook(
        lambda *_: torch.nn.functional.one_hot(torch.tensor([[end]]), len(tokenizer)) * 1.0
    )
    ((completion,),) = generate(model, tokenizer, [[3, 4]], Decoding(max_new_tokens=5, stop=()))
    assert completion.ids == (end,)
    assert not completion.is_cut
