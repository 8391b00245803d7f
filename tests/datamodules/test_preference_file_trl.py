"""Messages of a preference file have the token ids that TRL's DPOTrainer makes of the same file with the same tokenizer."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from datamodules.tokenization import PairTokenizer
from tests.chat_templates import FAMILIES, tokenizer_of
from tests.datamodules.preference_examples import EXAMPLES, load

CONVERSATIONAL = ("messages.jsonl", "hh_chat.jsonl")
"""Explicit and implicit prompt, with a system turn and of several turns."""


RENDERS = [name for name in FAMILIES if name not in ("Gemma", "DeepSeek R1")]
"""Gemma refuses system turns, and TRL warns of R1's prompt, which is no prefix of its dialogues."""


def trl_ids(path: Path, tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[dict[str, Any]]:
    """What TRL's trainer makes of a file before it trains."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    models = [LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)) for _ in range(2)]  # type: ignore[arg-type]
    config = DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", max_length=None)
    rows = Dataset.from_json(str(path), cache_dir=str(folder / "cache"))
    return list(DPOTrainer(*models, args=config, train_dataset=rows, processing_class=tokenizer).train_dataset)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "family"), [(CONVERSATIONAL[0], name) for name in RENDERS] + [(CONVERSATIONAL[1], "ChatML")]
)
def test_token_ids_of_messages_are_those_of_trl(tmp_path: Path, name: str, family: str) -> None:
    """But for what a template writes behind the end of a turn, which a model that stops there never does."""
    path, tokenizer = EXAMPLES[name].write(tmp_path), tokenizer_of(family)
    _, ours, _ = PairTokenizer(tokenizer, 512, text_format="chat_template")(load(path)[0])
    theirs = trl_ids(path, tokenizer, tmp_path)
    assert len(ours) == len(theirs) > 0
    behind = tokenizer.encode("\n", add_special_tokens=False) if "im_end" in FAMILIES[family].end else []
    for pair, row in zip(ours, theirs, strict=True):
        assert list(pair.prompt_ids) == row["prompt_ids"]
        assert [*pair.chosen_ids, *behind] == row["chosen_ids"]
        assert [*pair.rejected_ids, *behind] == row["rejected_ids"]
