"""Chat templates that behave as published ones do, on a tokenizer of a few hundred tokens.

Each is written anew from what the published template does: which tokens it writes, what it strips, adds, drops or refuses.
"""

from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from datamodules.tokenization import train_bpe_tokenizer

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
QWEN_3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """One published template: its text, its tokens, and what ends a turn."""

    template: str
    tokens: tuple[str, ...]
    end: str
    eos: str = "</s>"


FAMILIES = {
    "ChatML": Family(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"),
    "Llama 3": Family(LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "Gemma": Family(GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "Mistral": Family(MISTRAL, (), "</s>"),
    "Qwen 3": Family(QWEN_3, ("<|im_start|>", "<|im_end|>", "<think>", "</think>"), "<|im_end|>"),
    "DeepSeek R1": Family(DEEPSEEK_R1, ("<|User|>", "<|Assistant|>", "<think>", "</think>"), "</s>"),
}


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with the template and the tokens of a family; don't change it."""
    family = FAMILIES[name]
    tokenizer = train_bpe_tokenizer(["What color is the sky? Blue. user assistant system model"], vocab_size=300)
    tokenizer.add_tokens([AddedToken(token, special="think" not in token, normalized=False) for token in family.tokens])
    tokenizer.eos_token = family.eos
    if "bos_token" not in family.template:
        tokenizer.bos_token = None  # as those of Qwen
    tokenizer.chat_template = family.template
    return tokenizer
