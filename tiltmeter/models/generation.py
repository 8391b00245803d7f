"""Completions by models: the same prompts, decoding and random numbers for every model that is compared.

Sampling adds Gumbel noise to log-probabilities and takes the largest (the Gumbel-max trick), with a random stream for each
prompt and sample: a completion depends neither on the batch it is in nor on the number of processes, the run's own random
numbers stay untouched, and two models that agree say the same, so that differences between them are the models'.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tiltmeter.errors import UserError, argument
from tiltmeter.models.guidance import Guidance, Guide
from tiltmeter.models.sampling import GumbelSampling, NoNaN
from tiltmeter.pairs.chat import end_of_turn_id


@dataclass(frozen=True)
class Completion:
    """A model's completion of one prompt."""

    text: str
    """Text of the completion, decoded without special tokens."""
    n_tokens: int
    """Tokens generated, the end-of-sequence token not counted; those that complete a stop text are."""
    is_cut: bool
    """Whether it was cut at the token limit, before the model ended it."""
    ids: tuple[int, ...] = field(default=(), repr=False, compare=False)
    """The tokens generated, the end-of-sequence token last if there was one; empty where they are not known any more."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read."""
        return not self.text.strip()


@dataclass(frozen=True)
class Decoding:
    """Options by which completions are drawn.

    Args:
        max_new_tokens: limit of a completion.
        temperature: 0 takes the likeliest token; above, logits are divided by it.
        top_p: share of probability that tokens are drawn from, the likeliest first.
        n_samples: completions of each prompt.
        seed: of the random streams.
        stop: texts that end a completion, and are no part of it: where the other speaker's turn would begin in a transcript.

    Raises:
        UserError: a value out of range, or several samples that would all be the same.
    """

    max_new_tokens: int = 96
    temperature: float = 0.0
    top_p: float = 1.0
    n_samples: int = 1
    seed: int = 0
    stop: Sequence[str] = ("\n\nHuman:",)

    def __post_init__(self) -> None:
        """Check the options against each other."""
        object.__setattr__(self, "stop", tuple(self.stop))
        if "" in self.stop:
            raise UserError(
                f"{argument('Decoding.stop')}: expected texts, got an empty one, which would end everything at once"
            )
        for name, least in (("max_new_tokens", 1), ("n_samples", 1), ("seed", 0), ("temperature", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{argument(f'Decoding.{name}')}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"{argument('Decoding.top_p')}: expected above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and (self.n_samples > 1 or self.top_p < 1):
            raise UserError(
                f"{argument('Decoding.temperature')}=0 always takes the likeliest token, so n_samples and top_p have no effect; "
                "set it to 1"
            )


def as_words(decoding: Decoding) -> str:
    """Describe in words how completions were drawn.

    >>> as_words(Decoding(max_new_tokens=20, temperature=1.0, top_p=0.9, n_samples=5))
    'temperature 1, top-p 0.9, 5 each, at most 20 tokens, up to “Human:”'
    """
    parts = [f"temperature {decoding.temperature:g}" if decoding.temperature else "the likeliest token each time"]
    parts += [f"top-p {decoding.top_p:g}"] * (decoding.top_p < 1)
    parts += [f"{decoding.n_samples} each"] * (decoding.n_samples > 1)
    parts += [f"at most {decoding.max_new_tokens} tokens", *(f"up to “{text.strip()}”" for text in decoding.stop)]
    return ", ".join(parts)


@dataclass(frozen=True)
class Job:
    """One completion to draw: where its answer goes, its prompt, its random stream."""

    place: int
    ids: list[int]
    stream: int
    guide_ids: list[int] = field(default_factory=list)
    """Prompt of the other model of two that are decoded as one."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    keys: Sequence[str] | None = None,
    tokens_per_batch: int = 16384,
    n_batches: int | None = None,
    guide: Guide | None = None,
) -> list[list[Completion]]:
    """Completions of token-id prompts, in left-padded batches of similar length.

    Args:
        model: any causal language model; its training mode and the global random numbers are left as they were.
        prompts: token ids, BOS included; cut from the left (BOS kept) where no room is left for a completion.
        keys: names of the prompts, which choose their random streams; None: their number.
        tokens_per_batch: rows × (prompt + completion) that are computed together, at most.
        n_batches: make so many batches, the last ones repeating a prompt to no effect; for models that are sharded over
            processes, which must all run forward equally often (:func:`count_batches`).
        guide: another model whose logits are mixed in at every token; None: none.

    Returns:
        For each prompt its ``decoding.n_samples`` completions.

    Raises:
        UserError: ``max_new_tokens`` leaves no room for a prompt; logits that are NaN.
    """
    jobs = make_jobs(model, tokenizer, prompts, decoding, keys)
    if guide is not None:
        own = prompts if guide.prompts is None else guide.prompts
        fitted = [fit_prompt(ids, guide.model, tokenizer, decoding) for ids in own]
        jobs = [replace(job, guide_ids=fitted[job.place // decoding.n_samples]) for job in jobs]
    found: dict[int, Completion] = {}
    ends = end_ids(model, tokenizer)
    with ready_to_generate(model), nullcontext() if guide is None else ready_to_generate(guide.model):
        for batch in cut_into_batches(jobs, decoding, tokens_per_batch, n_batches):
            for job, completion in zip(batch, _complete(model, tokenizer, batch, decoding, ends, guide), strict=True):
                found[job.place] = completion
    n = decoding.n_samples
    return [[found[prompt * n + sample] for sample in range(n)] for prompt in range(len(prompts))]


def make_jobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    keys: Sequence[str] | None,
) -> list[Job]:
    """The completions to draw, a prompt's samples behind one another.

    Raises:
        UserError: as :func:`fit_prompt`.
    """
    names = [str(i) for i in range(len(prompts))] if keys is None else keys
    return [
        Job(place, fit_prompt(ids, model, tokenizer, decoding), _stream(decoding.seed, name, sample))
        for place, (ids, name, sample) in enumerate(
            (ids, name, sample)
            for ids, name in zip(prompts, names, strict=True)
            for sample in range(decoding.n_samples)
        )
    ]


def fit_prompt(
    ids: Sequence[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding
) -> list[int]:
    """The tokens of a prompt that a completion continues: cut from the left (BOS kept) where no room is left for one.

    Raises:
        UserError: ``max_new_tokens`` leaves no room for any prompt.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and decoding.max_new_tokens >= limit:
        raise UserError(
            f"{argument('Decoding.max_new_tokens')}: expected less than the model's {limit} tokens, got {decoding.max_new_tokens}"
        )
    room = None if limit is None else limit - decoding.max_new_tokens
    return _cut_left(list(ids), room, tokenizer.bos_token_id)


def count_batches(lengths: Sequence[int], decoding: Decoding, *, tokens_per_batch: int = 16384) -> int:
    """Batches that :func:`generate` makes of prompts of these lengths."""
    jobs = [Job(i, [0] * n, 0) for i, n in enumerate(lengths) for _ in range(decoding.n_samples)]
    return len(cut_into_batches(jobs, decoding, tokens_per_batch, None))


def _complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Job],
    decoding: Decoding,
    ends: list[int],
    guide: Guide | None,
) -> list[Completion]:
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids, mask = (x.to(model.device) for x in _padded_left([job.ids for job in batch], pad))
    width = ids.shape[1]
    processors = LogitsProcessorList([NoNaN()])
    if guide is not None:
        own = (x.to(guide.model.device) for x in _padded_left([job.guide_ids for job in batch], pad))
        processors.insert(0, Guidance(guide, *own))
    if decoding.temperature > 0:
        processors.append(GumbelSampling([job.stream for job in batch], decoding.temperature, decoding.top_p))
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=ends,
        use_cache=True,
    )
    rows = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=processors,
        synced_gpus=any(
            isinstance(p, DTensor) for p in model.parameters()
        ),  # sharded: all processes step equally often
    )
    return [read_completion(row, ends, tokenizer, decoding.stop) for row in rows[:, width:].tolist()]


def _padded_left(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def cut_into_batches(jobs: Sequence[Job], decoding: Decoding, tokens: int, n_batches: int | None) -> list[list[Job]]:
    """Jobs by length, as many a batch as fit the budget, at least one."""
    batches: list[list[Job]] = []
    for job in sorted(jobs, key=lambda job: -len(job.ids)):
        if not batches or (len(batches[-1]) + 1) * (len(batches[-1][0].ids) + decoding.max_new_tokens) > tokens:
            batches.append([])
        batches[-1].append(job)
    filler = [batches[-1][-1]] if batches else [Job(-1, [0], 0)]
    return batches + [filler] * max((n_batches or 0) - len(batches), 0)


@contextmanager
def ready_to_generate(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, in which checkpointed blocks keep their cache, and none of the model's own ways of decoding.

    Those (sampling, penalties …) would fill in what our configuration leaves open. Compiled blocks run as written: they would
    be compiled again for each length.
    """
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)
        model.generation_config = own


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end a completion: the tokenizer's, those that the model's own file names, and the template's.

    A base model that is trained on dialogues in a chat template learns to end turns with a token that its file doesn't name.
    """
    ids = [tokenizer.eos_token_id, *named_end_ids(model.generation_config), end_of_turn_id(tokenizer)]
    return list(dict.fromkeys(i for i in ids if i is not None))


def named_end_ids(config: GenerationConfig | PreTrainedConfig | None) -> list[int]:
    """Ids of the end tokens that a configuration names; none, one or several."""
    named = getattr(config, "eos_token_id", None)
    return [] if named is None else [named] if isinstance(named, int) else list(named)


def read_completion(
    ids: list[int], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]
) -> Completion:
    """Read the completion out of the tokens after a prompt, up to the first that ends it, or to a text of ``stop``."""
    n = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    said = str(tokenizer.decode(ids[:n], skip_special_tokens=True))
    found = [at for at in (said.find(text) for text in stop) if at >= 0]
    if not found:
        return Completion(said, n, is_cut=n == len(ids), ids=tuple(ids[: n + 1]))

    def has_stopped(m: int) -> bool:
        so_far = str(tokenizer.decode(ids[:m], skip_special_tokens=True))
        return any(text in so_far for text in stop)

    n = 1 + bisect_left(range(1, n + 1), True, key=has_stopped)
    return Completion(said[: min(found)], n, is_cut=False, ids=tuple(ids[:n]))


def _cut_left(ids: list[int], room: int | None, bos: int | None) -> list[int]:
    if room is None or len(ids) <= room:
        return ids
    return [ids[0], *ids[len(ids) - room + 1 :]] if bos is not None and ids[0] == bos and room > 1 else ids[-room:]


def _stream(seed: int, key: str, sample: int) -> int:
    digest = hashlib.sha256(f"{seed}/{key}/{sample}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
