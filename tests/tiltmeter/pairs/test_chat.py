"""A chat template that prints the date prints the one that it is told; anything else of it stays as it is."""

from datetime import date, datetime

import pytest

from tests.tiny_models import make_tokenizer
from tiltmeter.errors import UserError
from tiltmeter.pairs.chat import prints_date, render_chat

LLAMA_3 = """
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- bos_token }}
{{- "Today Date: " + date_string + "\\n" }}
{%- for message in messages %}
    {{- message['role'] + ": " + message['content'] + "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "assistant: " }}
{%- endif %}"""
"""How the templates of Llama 3 ask for the date."""
PLAIN = "\n{% for m in messages %}\n{{ m.role }}: {{ m.content }}\n{% endfor %}\n"
TURNS = [{"role": "user", "content": "What %d is it?"}]


def rendered(template: str, day: str | None) -> str:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return render_chat(tokenizer, TURNS, date=day, add_generation_prompt=True)


def test_the_template_prints_the_day_it_is_told_and_is_otherwise_the_same() -> None:
    text = rendered(LLAMA_3, "2024-07-05")
    assert text == "<s>Today Date: 05 Jul 2024\nuser: What %d is it?\nassistant: "
    today = rendered(LLAMA_3, date.today().isoformat())
    tokenizer = make_tokenizer()
    tokenizer.chat_template = LLAMA_3
    assert today == tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%A, %B %-d, %Y", "%d/%m/%y %H:%M:%S %p", "%F %j %U"])
def test_a_date_in_any_form_is_what_the_clock_of_that_day_says(form: str) -> None:
    text = rendered(f"\n\n{{{{ strftime_now('{form}') }}}}|", "2024-07-05")
    assert text == f"\n\n{datetime(2024, 7, 5).strftime(form)}|"


def test_a_template_without_a_date_is_left_alone() -> None:
    assert rendered(PLAIN, "2024-07-05") == rendered(PLAIN, None) != ""


def test_only_templates_that_ask_for_the_time_print_it() -> None:
    tokenizer = make_tokenizer()
    for template, prints in ((LLAMA_3, True), (PLAIN, False), (None, False)):
        tokenizer.chat_template = template
        assert prints_date(tokenizer) is prints


def test_invalid_date_is_refused() -> None:
    with pytest.raises(UserError, match=r"^chat_date: expected a day such as 2026-01-31, got 31\.1\.2026"):
        rendered(LLAMA_3, "31.1.2026")
