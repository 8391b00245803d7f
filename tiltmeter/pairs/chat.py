"""Messages as a tokenizer's chat template writes them, on a day that stays the same."""

from collections.abc import Collection, Mapping, Sequence
from datetime import date as Date
from datetime import datetime, time
from typing import Literal

from transformers import PreTrainedTokenizerBase as Tokenizer

from tiltmeter.errors import UserError

TextFormat = Literal["transcript", "chat_template"]
TextChoice = Literal["auto", "transcript", "chat_template"]
"""Form in which a dialogue is written: as the exact text of the records, or as their messages by the tokenizer's own template."""
_NOW = "strftime_now"
"""Name under which templates of transformers find the clock."""
_DIRECTIVES = [f"%{pad}{letter}" for pad in ("-", "") for letter in "aAbBcdDeFGHIjmMpSTuUVwWxXyYZ"]
_FIXED_CLOCK = f"""
{{%- macro {_NOW}(format) -%}}
{{%- set found = namespace(text=format) -%}}
{{%- for directive, text in fixed_clock.items() -%}}
{{%- set found.text = found.text.replace(directive, text) -%}}
{{%- endfor -%}}
{{{{- found.text -}}}}
{{%- endmacro +%}}""".strip()
"""A clock that stands still, written in front of a template: transformers lets templates see plain values only, no functions."""


def prints_date(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer's chat template asks for the time, as those of the Llama 3 family do."""
    return _NOW in str(tokenizer.chat_template)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    date: str | None,
    add_generation_prompt: bool = False,
) -> str:
    """Text of a dialogue by the tokenizer's own chat template.

    Args:
        messages: mappings with ``role`` and ``content``.
        date: the day that a template which prints one takes for today, as 2026-01-31, at midnight; None: the real one.
        add_generation_prompt: end with what an answer follows.

    Raises:
        UserError: no date, or the template refuses the dialogue or fails.
    """
    template, clock = tokenizer.get_chat_template(), {}
    if date is not None and _NOW in template:
        midnight = datetime.combine(as_date(date), time())
        template, clock = _FIXED_CLOCK + template, {d: midnight.strftime(d) for d in _DIRECTIVES}
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            fixed_clock=clock,
        )
    except Exception as problem:  # a template is a program of other people's
        what = " ".join(str(problem).split()) or type(problem).__name__
        raise UserError(f"the chat template can't render these messages: {what}") from problem
    return str(text)


def end_of_turn_id(tokenizer: Tokenizer) -> int | None:
    """Id of the token that the chat template writes behind an assistant's words, such as ``<|eot_id|>``.

    Returns:
        None: there is no template, it can't render a short dialogue, or it writes no token of its own there.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    word = "word"
    try:
        dialogue = [{"role": "user", "content": word}, {"role": "assistant", "content": word}]
        behind = render_chat(tokenizer, dialogue, date=None).rpartition(word)[2]
    except UserError:
        return None
    own = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((i for i in tokenizer.encode(behind, add_special_tokens=False) if i in own), None)


def settle_text_format(asked: TextChoice, tokenizer: Tokenizer, end_ids: Collection[int]) -> tuple[TextFormat, str]:
    """Settle ``auto``: the chat template for models that end their turns as it does, transcripts for others; and why.

    A tokenizer's template alone says little: base models often bring the one of their chat model. Those stop at the end of a
    text only; chat models at the token that ends a turn of the template.

    Args:
        asked: anything but ``auto`` is taken as it is.
        end_ids: tokens at which the model stops, beside the tokenizer's EOS.
    """
    if asked != "auto":
        return asked, "as asked"
    if not getattr(tokenizer, "chat_template", None):
        return "transcript", "the tokenizer has no chat template"
    end = end_of_turn_id(tokenizer)
    if end is None:
        return "transcript", "its chat template ends turns with no token"
    name = tokenizer.convert_ids_to_tokens(end)
    if end in (tokenizer.eos_token_id, *end_ids):
        return "chat_template", f"the model stops at {name}, which ends its turns"
    return "transcript", f"there is a chat template, but the model doesn't stop at its {name}, as base models don't"


def as_date(text: str | None) -> Date:
    """A date from its ISO form.

    Raises:
        UserError: it is none.

    >>> as_date("2026-01-31").day
    31
    """
    try:
        return Date.fromisoformat(str(text))
    except ValueError:
        raise UserError(f"chat_date: expected a day such as 2026-01-31, got {text}") from None
