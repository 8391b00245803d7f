"""Messages as a tokenizer's chat template writes them, on a day that stays the same."""

from collections.abc import Mapping, Sequence
from datetime import date as Date
from datetime import datetime, time

from transformers import PreTrainedTokenizerBase as Tokenizer

from tiltmeter.errors import UserError

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
