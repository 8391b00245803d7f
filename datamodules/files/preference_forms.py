r"""The forms in which rows of preference files state a prompt and two responses: TRL's, UltraFeedback's, ShareGPT's, Anthropic's.

A form is told from the kinds of a row's columns, text or messages. A message is an object with ``role`` and ``content``, or
``from`` and ``value``; ``human`` is a user, ``gpt`` an assistant.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from datamodules.hh import parse_row
from datamodules.records import Message, Role, transcript
from tiltmeter.errors import UserError

Kind = Literal["", "text", "messages"]
Row = Mapping[str, Any]
"""A row under the names of :data:`COLUMNS`."""
COLUMNS = ("prompt", "chosen", "rejected", "messages", "system", "score_chosen", "score_rejected")
"""Names that columns may have, by default or by ``data.columns``; ``messages`` also ``conversations``."""
UNPAIRED = ("completion", "label")

TRANSCRIPTS = "whole Human/Assistant transcripts"
FORMS: Mapping[tuple[Kind, Kind, Kind, Kind], str] = {
    ("text", "text", "text", ""): "prompt and responses as text",
    ("", "text", "text", ""): "responses as text with a common beginning",
    ("messages", "messages", "messages", ""): "prompt and responses as messages",
    ("messages", "text", "text", ""): "prompt as messages, responses as text",
    ("text", "messages", "messages", ""): "prompt as text, responses as messages",
    ("", "messages", "messages", ""): "messages with a common beginning",
    ("", "", "text", "messages"): "messages and a rejected answer as text",
    ("", "", "messages", "messages"): "messages and a rejected answer",
    ("", "text", "text", "messages"): "messages and two answers as text",
    ("", "messages", "messages", "messages"): "messages and two answers",
}
"""Kinds of ``prompt``, ``chosen``, ``rejected`` and ``messages`` → name; :data:`TRANSCRIPTS` is told by the texts."""

_ROLES: Mapping[str, Role] = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
_ANSWER = "\n\nAssistant:"
_HUMAN = "Human:"


class Parsed(NamedTuple):
    """One row, as messages and as exact text; see :class:`~datamodules.records.PreferencePair`."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    prompt_text: str
    chosen_text: str
    rejected_text: str

    @property
    def group(self) -> str:
        """The first user turn without regard to case and white space; dialogues that begin alike stay together."""
        first = next(turn.content for turn in self.prompt if turn.role == "user")
        return " ".join(first.lower().split())


class _Refusal(Exception):
    """Why a row is left out, a short phrase."""


def form_of(row: Row) -> str | None:
    """Name of a row's form; None: it has none of the known ones.

    >>> form_of({"chosen": "It is blue.", "rejected": "It is green."})
    'responses as text with a common beginning'
    """
    prompt, chosen, rejected, messages = (_kind(row.get(name)) for name in ("prompt", "chosen", "rejected", "messages"))
    whole = isinstance(row.get("chosen"), Sequence) and chosen == "messages" and len(row["chosen"]) > 1
    if prompt or whole:  # else messages repeats the chosen side, as in UltraFeedback
        messages = ""
    form = FORMS.get((prompt, chosen, rejected, messages))
    if form == "responses as text with a common beginning":
        sides = row["chosen"], row["rejected"]
        return TRANSCRIPTS if all(s.lstrip().startswith(_HUMAN) and _ANSWER in s for s in sides) else form
    return form


def common_form(rows: Iterable[Row]) -> str | None:
    """The form that most of the rows have; None: none has a known one."""
    found = Counter(form for form in map(form_of, rows) if form)
    return found.most_common(1)[0][0] if found else None


def parse(row: Row, form: str) -> Parsed | str:
    """Prompt and responses of a row, or the reason why it is left out.

    >>> parse({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "prompt and responses as text").prompt_text
    'The sky is'
    """
    missing = [name for name in ("chosen", "rejected") if name in row and row[name] is None]
    if form_of(row) != form:
        return f"without {missing[0]}" if missing else "not in the form of the first rows"
    try:
        parsed = _PARSERS.get(form, _messages)(row)
    except _Refusal as reason:
        return str(reason)
    chosen, rejected = parsed.chosen_text.strip(), parsed.rejected_text.strip()
    if not chosen or not rejected:
        return "empty response"
    return "identical responses" if chosen == rejected else parsed


def prompt_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Turns of a prompt that is given as messages, without an answer.

    Args:
        value: one message or a list of them.
        where: file and row, for the error.

    Raises:
        UserError: they are no messages, or the last isn't a user's.
    """
    try:
        turns = _turns(value, "user")
    except (_Refusal, AttributeError) as problem:
        reason = str(problem) if isinstance(problem, _Refusal) else "no role and content"
        raise UserError(f"{where}: messages can't be read: {reason}; expected [{{role, content}}, …]") from problem
    if turns[-1].role != "user":
        raise UserError(
            f"{where}: expected messages that end with a user's, which is to be answered; got {turns[-1].role}'s last"
        )
    return turns


def common_beginning(chosen: str, rejected: str) -> str:
    """The prompt that two texts share, as TRL's ``extract_prompt`` finds it: the space in front of the responses is theirs.

    >>> common_beginning("The sky is blue.", "The sky is green.")
    'The sky is'
    """
    n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    return chosen[: n - 1] if chosen[n - 1 : n] == " " else chosen[:n]


def _kind(value: Any) -> Kind:
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping) or (isinstance(value, Sequence) and all(isinstance(turn, Mapping) for turn in value)):
        return "messages"
    return ""


def _transcripts(row: Row) -> Parsed:
    chosen, rejected = ("\n\n" + row[name].lstrip() for name in ("chosen", "rejected"))
    return _of_transcripts(chosen, rejected)


def _of_transcripts(chosen: str, rejected: str) -> Parsed:
    parsed = parse_row(chosen, rejected)
    if isinstance(parsed, str):
        raise _Refusal(parsed)
    prompt, *texts = parsed
    return Parsed(prompt, texts[1].strip(), texts[2].strip(), *texts)


def _text(row: Row) -> Parsed:
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = row.get("prompt")
    if prompt is None:
        prompt = common_beginning(chosen, rejected)
        if not prompt.strip():
            raise _Refusal("no common beginning")
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt.strip():
        raise _Refusal("empty prompt")
    if prompt.endswith(_ANSWER) and prompt.lstrip().startswith(_HUMAN):
        return _of_transcripts(prompt + chosen, prompt + rejected)
    system = _system(row)
    text = "".join(f"{turn.content}\n\n" for turn in system) + prompt
    return Parsed((*system, Message("user", prompt.strip())), chosen.strip(), rejected.strip(), text, chosen, rejected)


def _messages(row: Row) -> Parsed:
    """Every form with messages in it: two dialogues, each whole or behind the prompt, share all turns but the last."""
    given = _turns(row.get("prompt"), "user")
    one, other = _dialogues(row, given)
    shared = tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    chosen, rejected = one[len(shared) :], other[len(shared) :]
    refusals = {
        "identical responses": one == other,
        "prompts differ": not shared,
        "one side is the beginning of the other": not (chosen and rejected),
        "the sides part before their last turn": max(len(chosen), len(rejected)) > 1,
        "the messages do not continue the prompt": not _contents(given) <= _contents(shared),
    }
    for reason in (reason for reason, applies in refusals.items() if applies):
        raise _Refusal(reason)
    system = () if any(turn.role == "system" for turn in shared) else _system(row)
    return _of_turns((*system, *shared), chosen[0], rejected[0])


def _of_turns(prompt: tuple[Message, ...], chosen: Message, rejected: Message) -> Parsed:
    if (chosen.role, rejected.role) != ("assistant", "assistant"):
        raise _Refusal("a response that is not the assistant's")
    turns = prompt[1:] if prompt[:1] and prompt[0].role == "system" else prompt
    if any(turn.role == "system" for turn in turns):
        raise _Refusal("a system turn that is not the first")
    if not turns or turns[-1].role != "user":
        raise _Refusal("the prompt does not end with a user's turn")
    if any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
        raise _Refusal("turns do not alternate")
    (text, a), (_, b) = transcript(prompt, chosen.content), transcript(prompt, rejected.content)
    return Parsed(prompt, chosen.content, rejected.content, text, a, b)


def _contents(turns: Sequence[Message]) -> set[str]:
    return {turn.content.strip() for turn in turns}


def _dialogues(row: Row, prompt: Sequence[Message]) -> list[tuple[Message, ...]]:
    """Whole dialogues of the chosen and the rejected side; ``messages`` stands in for what the row lacks."""
    chosen, rejected = (_turns(row.get(name), "assistant") for name in ("chosen", "rejected"))
    if not prompt and (not chosen or chosen[0].role == "assistant"):
        prompt = _turns(row["messages"], "user")
        if not chosen:
            prompt, chosen = prompt[:-1], prompt[-1:]
    return [side if side and side[0].role != "assistant" else (*prompt, *side) for side in (chosen, rejected)]


def _turns(value: Any, speaker: Role) -> tuple[Message, ...]:
    """Messages of a column, of which a text is one of the speaker's; none where there is no column."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = {"role": speaker, "content": value}
    turns = []
    for turn in [value] if isinstance(value, Mapping) else value:
        name, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if name not in _ROLES:
            raise _Refusal(f"a turn of another role ({name})")
        if content is not None and not isinstance(content, str):
            raise _Refusal("a turn that is not text")
        if not content or not content.strip():
            raise _Refusal("empty turn")
        turns.append(Message(_ROLES[name], content))
    if not turns:
        raise _Refusal("no messages")
    return tuple(turns)


def _system(row: Row) -> tuple[Message, ...]:
    system = row.get("system")
    return (Message("system", system),) if isinstance(system, str) and system.strip() else ()


_PARSERS = {
    TRANSCRIPTS: _transcripts,
    FORMS["text", "text", "text", ""]: _text,
    FORMS["", "text", "text", ""]: _text,
}
