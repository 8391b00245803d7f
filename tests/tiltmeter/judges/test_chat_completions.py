import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltmeter.judges.budget import Tokens
from tiltmeter.judges.chat_completions import (
    RequestFailed,
    first_token_probabilities,
    parse_response,
    read_reply,
    used_tokens,
)
from tiltmeter.judges.judge import ChatMessage, Question, Reply

ANSWERS = ("1", "2", "A", "yes")
spelled = st.builds(
    str.__add__, st.sampled_from(["", " ", "Ġ", "▁", "\n", "  "]), st.sampled_from([*ANSWERS, "3", "no"])
)


def choice(top: dict[str, float], said: str | None = None, **changes: Any) -> dict[str, Any]:
    entries = [{"token": token, "logprob": math.log(p)} for token, p in top.items()]
    first = {"token": said or next(iter(top)), "logprob": -1.0, "top_logprobs": entries} | changes
    return {"message": {"content": ""}, "finish_reason": "length", "logprobs": {"content": [first]}}


@given(st.dictionaries(spelled, st.floats(1e-6, 0.02), min_size=1, max_size=20))
def test_each_spelling_counts_to_its_answer_and_nothing_else_does(top: dict[str, float]) -> None:
    found = first_token_probabilities(choice(top), ANSWERS)
    for answer in ANSWERS:
        expected = sum(p for token, p in top.items() if token in (answer, f" {answer}", f"Ġ{answer}", f"▁{answer}"))
        assert found[answer] == pytest.approx(expected)


def test_a_token_that_was_said_without_being_among_the_likeliest_counts_too() -> None:
    found = first_token_probabilities(choice({"A": 0.5}, said="2", logprob=math.log(0.01)), ANSWERS)
    assert found == pytest.approx({"A": 0.5, "2": 0.01, "1": 0, "yes": 0})


@pytest.mark.parametrize(
    "bad",
    [
        {"logprobs": None},
        {},
        {"logprobs": {"content": []}},
        {"logprobs": {"content": None}},
        choice({"1": 0.5}, top_logprobs=None),
        choice({"1": 0.5}, top_logprobs=[{"token": "1"}]),
        choice({"1": 0.5}, top_logprobs=[{"token": "1", "logprob": None}]),
        choice({"1": 0.5}, top_logprobs=[{"token": "1", "logprob": math.nan}]),
        choice({"1": 0.5}, top_logprobs=[{"token": "1", "logprob": 1e9}]),
        choice({"1": 0.9, " 1": 0.9}),
    ],
)
def test_log_probs_that_are_none(bad: dict[str, Any]) -> None:
    with pytest.raises(RequestFailed, match=r"score_mode=sample") as caught:
        first_token_probabilities(bad, ANSWERS)
    assert not caught.value.is_passing


def test_no_words_but_log_probs_is_an_answer() -> None:
    question = Question((ChatMessage("user", "?"),), template="t", choices=("1",), want_probabilities=True)
    empty = choice({"1": 1.0}) | {"message": {"content": None}}
    assert read_reply(question, [{"choices": [empty]}]) == Reply(("",), {"1": 1.0})


def test_samples_without_words_among_others_are_kept_as_they_are() -> None:
    question = Question((ChatMessage("user", "?"),), template="t", n_samples=2)
    choices = [{"message": {"content": text}} for text in (None, "4", "too many")]
    assert read_reply(question, [{"choices": choices}]).texts == ("", "4")


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_no_json_whatever_breaks_the_reader(content: object) -> None:
    for text in (json.dumps(content), json.dumps({"choices": content}), json.dumps({"choices": [content]})):
        with pytest.raises(RequestFailed) as caught:
            parse_response(text, [])
        assert caught.value.is_passing


def test_an_error_in_the_place_of_an_answer_is_told() -> None:
    with pytest.raises(RequestFailed, match="overloaded"):
        parse_response(json.dumps({"error": {"message": "overloaded"}}), [])


@pytest.mark.parametrize("spelled", ["ab/cd-efgh", r"ab\/cd-efgh", r"\u0061b/cd-efgh", "ab%2Fcd-efgh"])
def test_a_secret_in_an_answer_goes_no_further_however_it_is_escaped(spelled: str) -> None:
    text = '{"choices": [{"message": {"content": "your key is KEY"}}]}'.replace("KEY", spelled)
    assert parse_response(text, ["ab/cd-efgh"])["choices"][0]["message"]["content"] == "your key is [redacted]"


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 0}, Tokens(3, 0)),
        ({"prompt_tokens": -3, "completion_tokens": 0}, None),
        ({"prompt_tokens": 3}, None),
        ({"prompt_tokens": "3", "completion_tokens": 1}, None),
        (None, None),
        ([], None),
    ],
)
def test_usage_that_the_server_does_not_tell_is_not_made_up(usage: object, expected: Tokens | None) -> None:
    assert used_tokens({"usage": usage}) == expected
