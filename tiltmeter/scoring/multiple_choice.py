"""Log-likelihoods of several answers to one prompt: each prompt runs once, and many of them share a forward pass.

Answers behind an equal context are one document (:mod:`tiltmeter.pairs.packing`): its tokens are computed once, each answer sees
the context and itself. Where a model's attention can't be packed, every answer is a padded row of its own; the numbers are
the same. The last token of an answer is only predicted, so it never enters the model: contexts may be as long as the
model's limit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiltmeter.errors import UserError
from tiltmeter.models.layers import sliding_window
from tiltmeter.pairs.batch import CHOSEN, PAD, PROMPT, PreferenceBatch
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.pairs.packing import PACKED_ATTENTION, Packing
from tiltmeter.pairs.verification import settle_packing

TOKENS_PER_BATCH = 4096
"""Tokens of a forward pass, padding included, unless something else is asked for."""

Forward = Callable[[PreferenceBatch], Tensor]
"""A batch to the summed log-probs of its sequences, as :func:`~tiltmeter.pairs.log_probs.sequence_log_probs` of a model, or the
wrapper of a sharded one around it."""


class Choice(NamedTuple):
    """An answer as token ids, behind what the model reads before it; both hold at least one token."""

    context_ids: tuple[int, ...]
    ids: tuple[int, ...]


class EncodedChoices(NamedTuple):
    """Answers to one prompt as tokens."""

    choices: list[Choice | None]
    """None: nothing is left of the answer, or it alone is longer than the model's limit; it can't be scored."""
    n_cut: int
    """Answers whose context lost tokens on the left to fit the model's limit."""


class Document(NamedTuple):
    """Answers with one context; a packed row computes the context once."""

    context_ids: tuple[int, ...]
    ids: list[tuple[int, ...]]
    places: list[int]
    """Place that each answer's log-likelihood belongs to."""

    @property
    def length(self) -> int:
        """Tokens that enter the model."""
        return len(self.context_ids) + sum(len(ids) - 1 for ids in self.ids)


def encode_choices(
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    continuations: Sequence[str],
    *,
    max_length: int | None = None,
    add_special_tokens: bool = True,
) -> EncodedChoices:
    """Token ids as lm-evaluation-harness makes them (0.4.12, ``_encode_pair`` and the truncation of ``HFLM``).

    White space at the context's end moves to the continuations. Context + continuation is tokenised as a whole, and the
    continuation is ``whole[len(context_ids):]``, also where the whole doesn't begin with the context's own ids. Of
    ``context_ids + ids`` the last ``max_length + 1`` are kept.

    Args:
        max_length: tokens that the model can read; None: any number.
        add_special_tokens: those that the tokenizer adds by default (Llama's BOS).

    Raises:
        ValueError: a context without a token.
    """
    start = context.rstrip()
    texts = [start, *(context + continuation for continuation in continuations)]
    encoded = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    context_ids, *wholes = (tuple(ids) for ids in encoded)
    if not context_ids:
        raise ValueError(f"encode_choices: expected a context of at least one token, got {context!r}")
    limit = len(context_ids) + max(map(len, wholes), default=0) if max_length is None else max_length
    choices: list[Choice | None] = []
    n_cut = 0
    for whole in wholes:
        ids = whole[len(context_ids) :]
        excess = max(0, len(context_ids) + len(ids) - (limit + 1))
        fits = 0 < len(ids) <= limit
        choices.append(Choice(context_ids[excess:], ids) if fits else None)
        n_cut += fits and excess > 0
    return EncodedChoices(choices, n_cut)


@torch.no_grad()
def choice_log_probs(
    model: PreTrainedModel,
    choices: Sequence[Choice],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    packed: bool | None = None,
    forward: Forward | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Float64[Tensor, " choice"]:
    """log π(answer | context) in nats, summed over the answer's tokens, of every answer; on the CPU, no length normalisation.

    The unembedding runs on answers' tokens only. Call it on every process alike: all run the same number of forward
    passes (fillers where batches don't divide, which count nowhere), and each returns 0 for what others compute, so that
    the sum over processes is the result.

    Tokens are summed in float64 and the sum has the precision of the model's log-probs: in float32 about 1e-7 of its size.

    Args:
        tokens_per_batch: tokens of a forward pass, padding included; an answer with its context that is longer runs alone.
        packed: documents behind one another in one row; None: where the model can, as
            :func:`~tiltmeter.pairs.verification.settle_packing` finds (the model then keeps its packed attention).
        forward: runs a batch in the model's stead: the module that DDP or FSDP wrapped around it. ``packed`` None then means:
            if the model has been prepared for it, since nothing but ``forward`` may run the model.

    Raises:
        UserError: ``packed`` is asked for and the model can't.
        ValueError: an empty context or answer, or an impossible size or rank.
    """
    _check(choices, tokens_per_batch, rank, world_size)
    totals = torch.zeros(len(choices), dtype=torch.float64)
    if not choices:
        return totals
    longest = max(len(choice.context_ids) + len(choice.ids) - 1 for choice in choices)
    with evaluating(model):
        packs = _settle(model, longest, packed, is_wrapped=forward is not None)
        batches = (_packed_batches if packs else _padded_batches)(choices, tokens_per_batch)
        run = forward or partial(sequence_log_probs, model)
        for first in range(0, len(batches), world_size):
            is_filler = first + rank >= len(batches)
            documents = batches[-1 if is_filler else first + rank]
            log_probs = run(collate_choices(documents, packed=packs).to(model.device))
            if not is_filler:
                places = [i for document in documents for i in document.places]
                totals[places] = log_probs.to("cpu", torch.float64)
    return totals


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No dropout inside; afterwards every module is in the mode that it was in."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def collate_choices(documents: Sequence[Document], *, packed: bool) -> PreferenceBatch:
    """Lay documents out as rows with one sequence an answer, in order; packed: all of them in one row.

    >>> two = Document((1, 5), [(6, 2), (7, 8, 9)], [0, 1])
    >>> batch = collate_choices([two], packed=True)
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[1, 5, 6, 7, 8]], [[0, 1, 2, 2, 3]])
    >>> batch.target_rows.tolist(), batch.target_ids.tolist(), batch.target_sequences.tolist()
    ([1, 2, 1, 3, 4], [6, 2, 7, 8, 9], [0, 0, 1, 1, 1])
    """
    width = sum(d.length for d in documents) if packed else max(d.length for d in documents)
    shape = (1 if packed else len(documents), width)
    tokens, positions, segments = (torch.full(shape, fill) for fill in (0, 0, PAD))
    targets: list[tuple[int, int, int]] = []
    at, n_sequences = 0, 0
    for i, document in enumerate(documents):
        at = at if packed else i * width
        laid = _lay_out(document)
        place = slice(at, at + document.length)
        for tensor, values in ((tokens, laid.ids), (positions, laid.positions), (segments, laid.segments)):
            tensor.view(-1)[place] = torch.tensor(values)
        targets += [(at + where, token, n_sequences + choice) for where, token, choice in laid.targets]
        at += document.length
        n_sequences += len(document.ids)
    rows, ids, sequences = torch.tensor(targets).unbind(1)
    return PreferenceBatch(
        input_ids=tokens,
        position_ids=positions,
        segments=segments,
        target_rows=rows,
        target_ids=ids,
        target_sequences=sequences,
        pair_index=torch.tensor([i for document in documents for i in document.places]),
        weights=torch.ones(n_sequences),
        layout="chosen_only",  # one response for each sequence
        packing=Packing(tuple(map(_parts, documents))) if packed else None,
    )


class _LaidOut(NamedTuple):
    ids: list[int]
    positions: list[int]
    segments: list[int]
    targets: list[tuple[int, int, int]]
    """(place of the hidden state that predicts, token, answer)"""


def _lay_out(document: Document) -> _LaidOut:
    n_context = len(document.context_ids)
    ids, positions = list(document.context_ids), list(range(n_context))
    targets = []
    for j, answer in enumerate(document.ids):
        places = [n_context - 1, *range(len(ids), len(ids) + len(answer) - 1)]
        targets += [(place, token, j) for place, token in zip(places, answer, strict=True)]
        ids += answer[:-1]
        positions += range(n_context, n_context + len(answer) - 1)
    return _LaidOut(ids, positions, [PROMPT] * n_context + [CHOSEN] * (len(ids) - n_context), targets)


def _parts(document: Document) -> tuple[int, ...]:
    """Tokens of the context and of each answer that has any; a packed document has at least one part behind its prompt."""
    return (len(document.context_ids), *([len(ids) - 1 for ids in document.ids if len(ids) > 1] or [0]))


def _packed_batches(choices: Sequence[Choice], tokens_per_batch: int) -> list[list[Document]]:
    """Documents in the order of their contexts, as many in a row as fit; one with too many answers is split."""
    documents: dict[tuple[int, ...], list[Document]] = {}
    for i, (context_ids, ids) in enumerate(choices):
        same = documents.setdefault(context_ids, [])
        if not same or same[-1].length + len(ids) - 1 > tokens_per_batch:
            same.append(Document(context_ids, [], []))
        same[-1].ids.append(ids)
        same[-1].places.append(i)
    batches: list[list[Document]] = []
    used = tokens_per_batch
    for document in (one for same in documents.values() for one in same):
        used += document.length
        if used > tokens_per_batch:
            batches.append([])
            used = document.length
        batches[-1].append(document)
    return batches


def _padded_batches(choices: Sequence[Choice], tokens_per_batch: int) -> list[list[Document]]:
    """A row for every answer, those of similar length together, so that little is padding."""
    rows = [Document(context_ids, [ids], [i]) for i, (context_ids, ids) in enumerate(choices)]
    batches: list[list[Document]] = []
    for row in sorted(rows, key=lambda row: row.length):  # the newest is the longest
        if not batches or (len(batches[-1]) + 1) * row.length > tokens_per_batch:
            batches.append([])
        batches[-1].append(row)
    return batches


def _settle(model: PreTrainedModel, longest: int, packed: bool | None, *, is_wrapped: bool) -> bool:
    """Whether rows are packed; what will run is verified unless the model was prepared before, or is out of reach."""
    prepared = model.config._attn_implementation == PACKED_ATTENTION
    if packed is None and (prepared or is_wrapped):
        return prepared and longest <= (sliding_window(model) or math.inf)
    if packed is False:
        return settle_packing(model, "concatenated", False, max_length=longest)
    try:
        return settle_packing(model, "shared_prefix", packed, max_length=longest)
    except UserError:
        if packed:
            raise
        return settle_packing(model, "concatenated", False, max_length=longest)


def _check(choices: Sequence[Choice], tokens_per_batch: int, rank: int, world_size: int) -> None:
    numbers: dict[str, Any] = {"tokens_per_batch": tokens_per_batch, "rank": rank, "world_size": world_size}
    if tokens_per_batch < 1 or not 0 <= rank < world_size:
        raise ValueError(f"choice_log_probs: expected sizes above 0 and rank below world_size, got {numbers}")
    if any(not choice.context_ids or not choice.ids for choice in choices):
        raise ValueError("choice_log_probs: expected at least one token in every context and answer, got an empty one")
