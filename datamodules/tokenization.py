"""From text to token ids, segment by segment: the prompt's ids are always a prefix, one BOS, one EOS, counted truncation."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datamodules.records import Message, PreferencePair
from tiltmeter.batch import TokenizedPair
from tiltmeter.chat import as_date, render_chat
from tiltmeter.errors import UserError

Truncation = Literal["keep_end", "drop", "error"]
TextFormat = Literal["transcript", "chat_template"]
_ANCHOR = "\n"


@dataclass(frozen=True)
class SegmentEncoder:
    """Encodes prompts and responses apart, so that no token ever spans the boundary.

    Tokenizers of the SentencePiece family put a space in front of whatever they encode; a response would then begin with a
    space that the transcript doesn't have. Such segments are encoded behind a newline, which never merges with what
    follows, and the newline's ids are cut off again.

    Args:
        tokenizer: any Hugging Face tokenizer.
        special_tokens: whether words such as ``</s>`` inside a text mean the token (rendered templates) or just
            themselves (people's words).
    """

    tokenizer: PreTrainedTokenizerBase
    special_tokens: bool = False

    def encode(self, text: str) -> list[int]:
        """Ids of a segment inside a transcript: no special tokens, no invented space."""
        if self._anchor_ids is None:
            return self._ids(text)
        ids = self._ids(_ANCHOR + text)
        if ids[: len(self._anchor_ids)] != self._anchor_ids:
            raise UserError(f"tokenizer: cannot encode a segment apart from its context: {text[:40]!r}")
        return ids[len(self._anchor_ids) :]

    def _ids(self, text: str) -> list[int]:
        plain = not self.special_tokens
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)
        return list(encoded["input_ids"])

    @cached_property
    def _anchor_ids(self) -> list[int] | None:
        """Ids of the newline to encode segments behind; None where a word is encoded alike alone and inside a text."""
        anchor, in_text = self._ids(_ANCHOR), self._ids(_ANCHOR + "word")
        return anchor if in_text != anchor + self._ids("word") and in_text[: len(anchor)] == anchor else None


@dataclass
class TokenizationReport:
    """Counts of everything that tokenisation cut or dropped."""

    n_pairs: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class PairTokenizer:
    """Turns preference pairs into token ids.

    Args:
        tokenizer: any Hugging Face tokenizer; BOS and EOS are added here, once, if it has them.
        max_length: longest prompt + response, in tokens, BOS and EOS included.
        max_response_length: a response keeps at least this many tokens before a too long pair cuts into it
            (default: half of ``max_length``).
        truncation: what happens to a pair longer than ``max_length``: ``keep_end`` cuts the prompt from the left (BOS
            stays), then the responses from the right (they lose their EOS); ``drop`` drops the pair; ``error`` stops.
        text_format: ``transcript`` encodes the records' exact text; ``chat_template`` renders their messages with the
            tokenizer's own template.
        chat_date: the day that a template which prints today's date prints, as 2026-01-31; None: today.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_response_length: int | None = None
    truncation: Truncation = "keep_end"
    text_format: TextFormat = "transcript"
    chat_date: str | None = None

    def __post_init__(self) -> None:
        """Check the options against each other and the tokenizer."""
        if self.max_length < 8:
            raise UserError(f"datamodule.max_length: expected at least 8 tokens, got {self.max_length}")
        if not 1 <= self.response_budget < self.max_length:
            given = self.max_response_length
            raise UserError(
                f"datamodule.max_response_length: expected 1 … max_length-1 = {self.max_length - 1}, got {given}"
            )
        if self.text_format == "chat_template" and not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                "datamodule.text_format=chat_template: this model's tokenizer has no chat template (base models rarely do); "
                "use datamodule.text_format=transcript"
            )
        if self.chat_date is not None:
            as_date(self.chat_date)
        if self.tokenizer.eos_token_id is None:
            raise UserError("model.tokenizer: expected a tokenizer with an EOS token, this one has none")

    @property
    def response_budget(self) -> int:
        """Tokens a response may keep when a pair is too long."""
        return self.max_length // 2 if self.max_response_length is None else self.max_response_length

    def __call__(
        self, pairs: Sequence[PreferencePair]
    ) -> tuple[list[PreferencePair], list[TokenizedPair], TokenizationReport]:
        """Tokenise pairs; pairs that can't be used are dropped and counted.

        Returns:
            the kept records, their token ids (same order), and the counts.

        Raises:
            UserError: no pair is left, or a pair is too long under ``truncation=error``.
        """
        report = TokenizationReport(n_pairs=len(pairs))
        encoder = SegmentEncoder(self.tokenizer, special_tokens=self.text_format == "chat_template")
        records: list[PreferencePair] = []
        tokenized: list[TokenizedPair] = []
        for record in pairs:
            ids = self._fit(record, self._encode(record, encoder), report)
            if ids is not None:
                records.append(record)
                tokenized.append(ids)
        if pairs and not tokenized:
            reasons = ", ".join(f"{n} {reason}" for reason, n in report.dropped.items())
            raise UserError(
                f"data: no pair is left of {len(pairs)} after tokenisation ({reasons}); raise datamodule.max_length"
            )
        return records, tokenized, report

    def _encode(self, record: PreferencePair, encoder: SegmentEncoder) -> TokenizedPair:
        if self.text_format == "transcript":
            prompt, chosen, rejected = record.prompt_text, record.chosen_text, record.rejected_text
        else:
            prompt = self._render(record.prompt, add_generation_prompt=True)
            chosen, rejected = (self._response_text(record, prompt, r) for r in (record.chosen, record.rejected))
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        prompt_ids = encoder.encode(prompt)
        if bos is not None and prompt_ids[:1] != [bos]:
            prompt_ids = [bos, *prompt_ids]
        responses = [_end_once(encoder.encode(text), eos) for text in (chosen, rejected)]
        return TokenizedPair(prompt_ids, responses[0], responses[1])

    def _render(self, messages: Iterable[Message], *, add_generation_prompt: bool) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return render_chat(self.tokenizer, turns, date=self.chat_date, add_generation_prompt=add_generation_prompt)

    def _response_text(self, record: PreferencePair, prompt: str, response: Message) -> str:
        whole = self._render((*record.prompt, response), add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise UserError(
                f"datamodule.text_format=chat_template: the template's prompt is not a prefix of its dialogue (pair "
                f"{record.pair_id}); use datamodule.text_format=transcript"
            )
        return whole[len(prompt) :]

    def _fit(self, record: PreferencePair, ids: TokenizedPair, report: TokenizationReport) -> TokenizedPair | None:
        prompt, chosen, rejected = (list(x) for x in ids)
        longest = max(len(chosen), len(rejected))
        if not prompt:
            report.dropped["prompt without tokens"] += 1
            return None
        if len(prompt) + longest > self.max_length:
            if self.truncation == "error":
                raise UserError(
                    f"data: pair {record.pair_id} has {len(prompt)} prompt + {longest} response tokens, more than "
                    f"datamodule.max_length={self.max_length}; raise it, or set datamodule.truncation=keep_end or drop"
                )
            if self.truncation == "drop":
                report.dropped[f"longer than {self.max_length} tokens"] += 1
                return None
            room = self.max_length - min(longest, self.response_budget)
            if len(prompt) > room:
                report.prompts_cut += 1
                prompt = _keep_end(prompt, room, self.tokenizer.bos_token_id)
            room = self.max_length - len(prompt)
            report.responses_cut += (len(chosen) > room) + (len(rejected) > room)
            chosen, rejected = chosen[:room], rejected[:room]
        if chosen == rejected:
            report.dropped["responses equal in tokens"] += 1
            return None
        return TokenizedPair(prompt, chosen, rejected)


def _end_once(ids: list[int], eos: int) -> list[int]:
    """Everything up to the first EOS, and exactly one EOS.

    A chat template closes the turn itself, sometimes with white space behind it.
    """
    return [*ids[: ids.index(eos)], eos] if eos in ids else [*ids, eos]


def _keep_end(ids: list[int], room: int, bos: int | None) -> list[int]:
    """The last ``room`` ids; a BOS at the front survives."""
    if bos is not None and ids[0] == bos:
        return [bos, *ids[len(ids) - room + 1 :]] if room > 1 else [bos]
    return ids[-room:]


def train_bpe_tokenizer(texts: Iterable[str], *, vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocab_size`` tokens, for models made from scratch.

    Ids 0, 1, 2 are ``<pad>``, ``<s>`` (BOS) and ``</s>`` (EOS). Any text round-trips.

    Raises:
        UserError: ``vocab_size`` is too small to hold all 256 bytes.
    """
    if vocab_size < 260:
        raise UserError(f"model.tokenizer.vocab_size: expected at least 260 (256 bytes and specials), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
