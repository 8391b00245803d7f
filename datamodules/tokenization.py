"""Tokenisation segment by segment: the prompt's ids are always a prefix, one BOS, one EOS, counted truncation."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datamodules.records import Message, PreferencePair
from tiltmeter.errors import UserError, argument
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.pairs.chat import TextFormat, as_date, end_of_turn_id, render_chat

Truncation = Literal["keep_end", "drop", "error"]
_ANCHOR = "\n"
_MARKS = range(0xF0000, 0xFFFFD)
"""Code points of private use, of which some stand for the words of special tokens while a template is rendered."""
SPECIAL_INSIDE = "with the id of a special token inside a text"
"""Reason for dropping a pair whose tokenizer can't write its words as words."""
_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")
"""A thinking block at the end of a generation prompt, opened or left empty, which a dialogue may lack."""


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
    special_words: int = 0
    """Pairs of a chat template whose texts hold words of special tokens, such as ``</s>``; they stay words."""
    dropped: Counter[str] = field(default_factory=Counter)
    written_as: str = ""
    """Text format and why, where it was chosen by the model."""


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
            tokenizer's own template. Only the template writes special tokens; what people wrote is text, also where it
            spells one (``</s>``, ``<|im_start|>``), and can end no turn and begin none.
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
            raise UserError(
                f"{argument('PairTokenizer.max_length')}: expected at least 8 tokens, got {self.max_length}"
            )
        if not 1 <= self.response_budget < self.max_length:
            given = self.max_response_length
            raise UserError(
                f"{argument('PairTokenizer.max_response_length')}: expected 1 … max_length-1 = {self.max_length - 1}, got {given}"
            )
        if self.text_format == "chat_template" and not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"{argument('PairTokenizer.text_format')}=chat_template: this model's tokenizer has no chat template (base "
                f"models rarely do); use {argument('PairTokenizer.text_format')}=transcript"
            )
        if self.chat_date is not None:
            as_date(self.chat_date)
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"{argument('CausalLM.tokenizer')}: expected a tokenizer with an EOS token, this one has none"
            )

    @property
    def response_budget(self) -> int:
        """Tokens a response may keep when a pair is too long."""
        return self.max_length // 2 if self.max_response_length is None else self.max_response_length

    def __call__(
        self, pairs: Sequence[PreferencePair]
    ) -> tuple[list[PreferencePair], list[TokenizedPair], TokenizationReport]:
        """Turn pairs into token ids; pairs that can't be used are dropped and counted.

        Returns:
            the kept records, their token ids (same order), and the counts.

        Raises:
            UserError: no pair is left, or a pair is too long under ``truncation=error``.
        """
        report = TokenizationReport(n_pairs=len(pairs))
        records: list[PreferencePair] = []
        tokenized: list[TokenizedPair] = []
        for record in pairs:
            try:
                encoded = self._of_template(record, report) if self._uses_template else self._of_transcript(record)
            except UserError as error:
                raise UserError(f"{error} (pair {record.pair_id})") from error
            if encoded is None:
                report.dropped[SPECIAL_INSIDE] += 1
                continue
            ids = self._fit(record, encoded, report)
            if ids is not None:
                records.append(record)
                tokenized.append(ids)
        if pairs and not tokenized:
            reasons = ", ".join(f"{n} {reason}" for reason, n in report.dropped.items())
            raise UserError(
                f"data: no pair is left of {len(pairs)} after tokenisation ({reasons}); raise "
                f"{argument('PairTokenizer.max_length')}, or take another tokenizer or {argument('PairTokenizer.text_format')}"
            )
        return records, tokenized, report

    @property
    def _uses_template(self) -> bool:
        return self.text_format == "chat_template"

    @cached_property
    def _encoder(self) -> SegmentEncoder:
        return SegmentEncoder(self.tokenizer, special_tokens=self._uses_template)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """Ids that no text may have; the unknown token is one only where it also begins or ends texts."""
        ends = {self.tokenizer.bos_token_id, self.tokenizer.eos_token_id}
        return frozenset(self.tokenizer.all_special_ids) - ({self.tokenizer.unk_token_id} - ends)

    @cached_property
    def _special_words(self) -> list[str]:
        """Texts that a tokenizer reads as tokens which only the template may write: special ones, and its role markers."""
        turn = self._render([Message("user", "word")], add_generation_prompt=True)
        added = self.tokenizer.added_tokens_decoder.values()
        words = {token.content for token in added if token.special or token.content in turn}
        return sorted(words | set(self.tokenizer.all_special_tokens), key=lambda word: (-len(word), word))

    def _of_transcript(self, record: PreferencePair) -> TokenizedPair | None:
        """Ids of the exact text; None: a special one is among them."""
        texts = (record.prompt_text, record.chosen_text, record.rejected_text)
        prompt, chosen, rejected = (self._encoder.encode(text) for text in texts)
        if not self._special_ids.isdisjoint([*prompt, *chosen, *rejected]):
            return None
        eos = self.tokenizer.eos_token_id
        return TokenizedPair(self._begin_once(prompt), [*chosen, eos], [*rejected, eos])

    def _of_template(self, record: PreferencePair, report: TokenizationReport) -> TokenizedPair | None:
        """Ids of the rendered messages, in which people's words are words; None: they can't be told from special tokens."""
        turns = (*record.prompt, record.chosen, record.rejected)
        words = dict.fromkeys(found for turn in turns for found in self._special_pattern.findall(turn.content))
        report.special_words += bool(words)
        marks = _unused_marks("".join(turn.content for turn in turns), len(words))
        mark_of = dict(zip(words, marks, strict=True))

        def marked(turn: Message) -> Message:
            return Message(turn.role, self._special_pattern.sub(lambda found: mark_of[found[0]], turn.content))

        turns = tuple(map(marked, turns))
        prompt, responses = self._split(turns[:-2], turns[-2:])
        word_of = {mark: self._ids_of_word(word) for word, mark in mark_of.items()}
        sides = [self._end_once(self._encode_marked(text, word_of)) for text in responses]
        if any(ids is None for ids in (*word_of.values(), *sides)):
            return None
        return TokenizedPair(self._begin_once(self._encode_marked(prompt, word_of)), *sides)  # type: ignore[arg-type]

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._special_words)))

    def _encode_marked(self, text: str, word_of: Mapping[str, list[int] | None]) -> list[int]:
        """Ids of a rendered text, in which each mark stands for the ids of a word."""
        pieces = re.split(f"([{''.join(word_of)}])", text) if word_of else [text]
        return [i for piece in pieces if piece for i in word_of.get(piece) or self._encoder.encode(piece)]

    def _ids_of_word(self, word: str) -> list[int] | None:
        """Ids of the word of a special token as the letters that it is; None: the tokenizer has no others for it."""
        plain = SegmentEncoder(self.tokenizer)
        own = {self.tokenizer.convert_tokens_to_ids(special) for special in self._special_words}
        for pieces in ([word], [word[:1], word[1:]]):  # added tokens that aren't special are found in any text
            ids = [i for piece in pieces if piece for i in plain.encode(piece)]
            if own.isdisjoint(ids):
                return ids
        return None

    def _begin_once(self, ids: list[int]) -> list[int]:
        """A prompt behind one BOS, which a template may have written."""
        bos = self.tokenizer.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    @cached_property
    def _ends(self) -> list[int]:
        """Tokens that end a response: the tokenizer's EOS, and the one with which the template ends a turn."""
        return [i for i in (self.tokenizer.eos_token_id, end_of_turn_id(self.tokenizer)) if i is not None]

    def _end_once(self, ids: list[int]) -> list[int] | None:
        """A rendered response up to the token with which the template ended it, or with EOS; None: words stand behind it."""
        end = next((at for at, token in enumerate(ids, 1) if token in self._ends), None)
        if end is None:
            return [*ids, self._ends[0]]
        return None if str(self.tokenizer.decode(ids[end:], skip_special_tokens=True)).strip() else ids[:end]

    def _render(self, messages: Iterable[Message], *, add_generation_prompt: bool) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return render_chat(self.tokenizer, turns, date=self.chat_date, add_generation_prompt=add_generation_prompt)
        except UserError as error:
            raise UserError(
                f"{argument('PairTokenizer.text_format')}=chat_template: {error}; leave such rows out, or use "
                f"{argument('PairTokenizer.text_format')}=transcript"
            ) from error

    def _split(self, turns: Sequence[Message], sides: Sequence[Message]) -> tuple[str, list[str]]:
        """The rendered prompt, and what follows it in the dialogue with either response."""
        prompt = self._render(turns, add_generation_prompt=True)
        wholes = [self._render((*turns, side), add_generation_prompt=False) for side in sides]
        for start in (prompt, _THINKING.sub("", prompt)):
            if all(whole.startswith(start) for whole in wholes):
                return start, [whole[len(start) :] for whole in wholes]
        raise UserError(
            f"{argument('PairTokenizer.text_format')}=chat_template: the template's prompt is not a prefix of its dialogue; "
            f"use {argument('PairTokenizer.text_format')}=transcript"
        )

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
                    f"{argument('PairTokenizer.max_length')}={self.max_length}; raise it, or set "
                    f"{argument('PairTokenizer.truncation')}=keep_end or drop"
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


def _unused_marks(text: str, n: int) -> list[str]:
    """Find so many characters of private use that a text doesn't have."""
    return list(islice((mark for mark in map(chr, _MARKS) if mark not in text), n))


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
