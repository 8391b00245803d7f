"""Messages of a preference file have the token ids that TRL's DPOTrainer makes of the same file with the same tokenizer."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from datamodules.tokenization import PairTokenizer, train_bpe_tokenizer
from tests.datamodules.preference_examples import EXAMPLES, load

ZEPHYR = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CONVERSATIONAL = ("messages.jsonl", "hh_chat.jsonl")
"""Explicit and implicit prompt, with a system turn and of several turns."""


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = train_bpe_tokenizer(["What color is the sky? Blue. <|user|><|assistant|>"], vocab_size=300)
    tokenizer.chat_template = template
    return tokenizer


def trl_ids(path: Path, tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[dict[str, Any]]:
    """What TRL's trainer makes of a file before it trains."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    models = [LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)) for _ in range(2)]  # type: ignore[arg-type]
    config = DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", max_length=None)
    rows = Dataset.from_json(str(path), cache_dir=str(folder / "cache"))
    return list(DPOTrainer(*models, args=config, train_dataset=rows, processing_class=tokenizer).train_dataset)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONVERSATIONAL)
@pytest.mark.parametrize("template", [ZEPHYR, CHATML], ids=["ends with EOS", "writes a line break behind EOS"])
def test_token_ids_of_messages_are_those_of_trl(tmp_path: Path, name: str, template: str) -> None:
    path, tokenizer = EXAMPLES[name].write(tmp_path), tokenizer_with(template)
    _, ours, _ = PairTokenizer(tokenizer, 512, text_format="chat_template")(load(path)[0])
    theirs = trl_ids(path, tokenizer, tmp_path)
    assert len(ours) == len(theirs) > 0
    behind = [] if template == ZEPHYR else tokenizer.encode("\n", add_special_tokens=False)
    for pair, row in zip(ours, theirs, strict=True):
        assert list(pair.prompt_ids) == row["prompt_ids"]
        assert [*pair.chosen_ids, *behind] == row["chosen_ids"]
        assert [*pair.rejected_ids, *behind] == row["rejected_ids"]
