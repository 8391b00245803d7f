"""A language model in this process as a judge: probabilities of the choices from one forward pass, words by generation."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tiltmeter.errors import UserError
from tiltmeter.judges.judge import ChatMessage, Question, Reply
from tiltmeter.models.causal_lm import DTYPES, CausalLM
from tiltmeter.models.generation import end_ids
from tiltmeter.models.layers import backbone, unembedding
from tiltmeter.pairs.chat import render_chat
from tiltmeter.pairs.log_probs import token_log_probs


class _Loaded(NamedTuple):
    """Everything that exists after the start."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    max_length: int
    uses_chat_template: bool
    takes_system_turn: bool


class _Prompt(NamedTuple):
    """A question as the model reads it."""

    place: int
    question: Question
    text: str
    ids: list[int]


class LocalJudge:
    """A :class:`~tiltmeter.judges.judge.Judge` that is a causal language model of the Hugging Face kind.

    A prompt that doesn't fit is a failure with its length, never cut. Answers don't depend on which questions are asked
    together, but for rounding: drawn ones come from a seed and the question's own words.

    Args:
        model: hub id or folder with safetensors weights.
        revision: commit or tag on the hub; pin it for figures that are to be remade.
        dtype: of the weights.
        device: as in PyTorch; None: the first CUDA device if there is one, else the CPU.
        batch_size: prompts in one forward pass.
        max_length: tokens of prompt and answer together; None: as many as the model has positions for.
        attn_implementation: ``sdpa`` or ``eager``; None: ``sdpa`` where the family has it.
        chat_template: whether questions are laid out by the tokenizer's own template; None: if it has one.
        seed: of drawn answers.

    Raises:
        UserError: an unknown dtype or device, or a number below 1.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        attn_implementation: str | None = None,
        chat_template: bool | None = None,
        chat_date: str | None = None,
        seed: int = 0,
    ) -> None:
        if not model:
            raise UserError("judge.model: expected a hub id or a folder, got none")
        if dtype not in DTYPES:
            raise UserError(f"judge.dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise UserError(
                f"judge: expected batch_size and max_length of at least 1, got {batch_size} and {max_length}"
            )
        try:
            self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise UserError(f"judge.device: expected a device such as cpu or cuda:0, got {device}") from error
        self._spec = CausalLM(
            name_or_path=model, revision=revision, dtype=dtype, attn_implementation=attn_implementation
        )
        self._batch_size, self._max_length = batch_size, max_length
        self._chat_template, self._chat_date, self._seed = chat_template, chat_date, seed
        self._loaded: _Loaded | None = None
        self._spelling_ids: dict[str, list[int]] = {}
        template = {None: "", True: " chat", False: " plain"}[chat_template]
        self.name = f"local:{model}@{revision or 'main'} {dtype}{template}"

    def start(self, *, want_probabilities: bool) -> None:
        """Load the model; probabilities it always has.

        Raises:
            UserError: it can't be loaded, has no chat template where one is wanted, or fewer positions than ``max_length``.
        """
        if self._loaded is not None:
            return
        try:
            tokenizer = self._spec.load_tokenizer()
            model = cast(nn.Module, self._spec.build(tokenizer)).to(self._device)
        except UserError as error:
            raise UserError(f"judge: {error}") from error
        positions = getattr(model.config, "max_position_embeddings", None)
        if self._max_length is not None and positions is not None and self._max_length > positions:
            raise UserError(
                f"judge.max_length: expected at most {positions}, as {self.name} has, got {self._max_length}"
            )
        max_length = self._max_length or positions
        if max_length is None:
            raise UserError(f"judge.max_length: {self.name} doesn't say how many tokens it takes; set one")
        has_template = bool(tokenizer.chat_template)
        if self._chat_template and not has_template:
            raise UserError(f"judge.chat_template: {self.name} has none; set judge.chat_template=false for plain text")
        uses_template = has_template if self._chat_template is None else self._chat_template
        takes_system = uses_template and _takes_system_turn(tokenizer)
        self._loaded = _Loaded(
            cast(PreTrainedModel, model.eval().requires_grad_(False)),
            tokenizer,
            max_length,
            uses_template,
            takes_system,
        )

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Answer all questions, those for probabilities in batches of similar length."""
        replies: dict[int, Reply] = {}
        prompts = []
        for i, question in enumerate(questions):
            prompt = self._prompt(i, question)
            length, limit = len(prompt.ids) + question.max_tokens, self._ready.max_length
            if length > limit:
                reason = f"prompt and answer take {length} tokens, {self.name} has room for {limit}"
                replies[i] = Reply(failure="api", reason=reason)
            else:
                prompts.append(prompt)
        for batch in self._batches(prompts):
            for prompt, reply in zip(batch, self._answer(batch), strict=True):
                replies[prompt.place] = reply
        return [replies[i] for i in range(len(questions))]

    @torch.no_grad()
    def _answer(self, batch: Sequence[_Prompt]) -> list[Reply]:
        """Answer prompts that can run together."""
        try:
            return self._weigh(batch) if batch[0].question.want_probabilities else self._speak(batch)
        except torch.OutOfMemoryError:
            reason = (
                f"out of memory with {len(batch)} prompts of up to {len(batch[-1].ids)} tokens; lower judge.batch_size"
            )
            return [Reply(failure="api", reason=reason)] * len(batch)

    @property
    def _ready(self) -> _Loaded:
        assert self._loaded is not None, "started"
        return self._loaded

    def _batches(self, prompts: Sequence[_Prompt]) -> Iterator[list[_Prompt]]:
        """Prompts that can run together: for probabilities by length, for words by decoding, drawn words one by one."""
        kinds: dict[tuple[object, ...], list[_Prompt]] = {}
        for prompt in sorted(prompts, key=lambda p: len(p.ids)):
            q = prompt.question
            draws = not q.want_probabilities and q.temperature > 0
            kind = (q.want_probabilities, q.max_tokens, prompt.place if draws else None)
            kinds.setdefault(kind, []).append(prompt)
        for same in kinds.values():
            for at in range(0, len(same), self._batch_size):
                yield same[at : at + self._batch_size]

    def _prompt(self, place: int, question: Question) -> _Prompt:
        """Lay a question out and tokenise it."""
        messages: Sequence[ChatMessage] = question.messages
        if not self._ready.takes_system_turn:
            messages = [ChatMessage("user", "\n\n".join(message.content for message in messages))]
        if not self._ready.uses_chat_template:
            text = messages[0].content
        else:
            turns = [message._asdict() for message in messages]
            text = render_chat(self._ready.tokenizer, turns, date=self._chat_date, add_generation_prompt=True)
        return _Prompt(place, question, text, self._encode(text))

    def _encode(self, text: str) -> list[int]:
        """Ids; a chat template has written the special tokens already."""
        special = not self._ready.uses_chat_template
        return cast(list[int], self._ready.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _spellings(self, choice: str) -> list[int]:
        """:func:`spelling_ids`, looked for once."""
        if choice not in self._spelling_ids:
            self._spelling_ids[choice] = spelling_ids(self._ready.tokenizer, choice)
        return self._spelling_ids[choice]

    def _padded(self, prompts: Sequence[_Prompt]) -> tuple[Tensor, Tensor]:
        """Ids and mask, padded on the left, so that every prompt ends in the last column."""
        rows = [torch.tensor(prompt.ids) for prompt in prompts]
        ids = pad_sequence(rows, batch_first=True, padding_side="left").to(self._device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        return ids, mask.to(self._device)

    def _weigh(self, prompts: Sequence[_Prompt]) -> list[Reply]:
        """Probabilities of each question's choices at the first answer token."""
        hidden = self._last_hidden_states(prompts)
        replies = []
        for row, prompt in zip(hidden, prompts, strict=True):
            spellings = {choice: self._spellings(choice) for choice in prompt.question.choices}
            unspelt = [choice for choice, ids in spellings.items() if not ids]
            if unspelt:
                reason = f"{unspelt[0]!r} is not a single token of {self.name}"
                replies.append(Reply(failure="api", reason=reason))
                continue
            targets = torch.tensor([i for ids in spellings.values() for i in ids], device=self._device)
            logps = token_log_probs(row.expand(len(targets), -1), unembedding(self._ready.model), targets)
            left = iter(logps.double().exp().tolist())
            replies.append(
                Reply(probabilities={choice: sum(next(left) for _ in ids) for choice, ids in spellings.items()})
            )
        return replies

    def _last_hidden_states(self, prompts: Sequence[_Prompt]) -> Float[Tensor, "prompt d_model"]:
        """Hidden state after the final norm at the last token of each prompt; the unembedding does not run."""
        ids, mask = self._padded(prompts)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        run = backbone(self._ready.model)
        out = run(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return cast(Tensor, out.last_hidden_state)[:, -1]

    def _speak(self, prompts: Sequence[_Prompt]) -> list[Reply]:
        """Generated words; drawn ones from a generator that the question alone decides."""
        model, tokenizer = self._ready.model, self._ready.tokenizer
        question = prompts[0].question
        draws = question.temperature > 0
        decoding = GenerationConfig(
            max_new_tokens=question.max_tokens,
            use_cache=True,  # whatever training left in the model's configuration
            do_sample=draws,
            num_return_sequences=question.n_samples if draws else 1,
            temperature=question.temperature if draws else None,
            top_p=question.top_p if draws else None,
            top_k=0 if draws else None,
            eos_token_id=end_ids(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
        ids, mask = self._padded(prompts)
        devices = [self._device] if self._device.type == "cuda" else []
        digest = hashlib.sha256(f"{self._seed}\0{prompts[0].text}".encode()).digest()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            whole = cast(Any, model).generate(ids, attention_mask=mask, generation_config=decoding)
        texts = tokenizer.batch_decode(whole[:, ids.shape[1] :], skip_special_tokens=True)
        n = len(texts) // len(prompts)
        repeat = 1 if draws else question.n_samples
        return [Reply(texts=tuple(texts[i * n : (i + 1) * n] * repeat)) for i in range(len(prompts))]


def spelling_ids(tokenizer: Tokenizer, choice: str) -> list[int]:
    """Every id that spells a choice after whatever stands before it, with or without a space.

    It is what the id adds to decoded text that counts, so that neither a tokenizer's way to write a space matters nor whether
    it would have joined the choice to the end of the prompt, which a model that answers token by token can't do.
    """

    def decoded(ids: list[int]) -> str:
        return cast(str, tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    before = cast(list[int], tokenizer("x", add_special_tokens=False)["input_ids"])
    text = decoded(before)
    spelt = (f"{text}{choice}", f"{text} {choice}")
    return sorted(i for piece, i in tokenizer.get_vocab().items() if choice in piece and decoded([*before, i]) in spelt)


def _takes_system_turn(tokenizer: Tokenizer) -> bool:
    """Whether the chat template has a place for a system turn; some refuse it, some leave it out."""
    system, user = "one-of-two", "two-of-two"
    turns = [ChatMessage("system", system)._asdict(), ChatMessage("user", user)._asdict()]
    try:
        text = render_chat(tokenizer, turns, date=None)
    except Exception:  # templates raise whatever their authors chose
        return False
    return system in text
