"""Several pairs behind one another in one row, without padding and without seeing each other.

A *document* is a prompt and the responses that follow it. Each response sees the prompt and itself, nothing sees another
document. No mask over the whole row is ever made: attention runs once per document where kernels take a mask (any
device), and once over all of them where a variable-length kernel does (CUDA, 16 bits). There every prompt and every
response is a *segment* of queries with its own stretch of keys, a response's being its prompt and itself (the idea of
flash-preference).
"""

import functools
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tiltmeter.errors import UserError, argument

PACKED_ATTENTION = "tiltmeter_packed"
"""Name under which transformers finds :func:`packed_attention`."""


class Segments(NamedTuple):
    """Queries and keys of every segment, as variable-length kernels take them.

    Segment s has the queries ``cumulative_queries[s] … [s+1]`` of the row, and the keys that ``key_index`` names at
    ``cumulative_keys[s] … [s+1]``; its last query sees its last key (a causal mask aligned at the bottom right).
    """

    cumulative_queries: Int[Tensor, " segment+1"]
    cumulative_keys: Int[Tensor, " segment+1"]
    key_index: Int[Tensor, " key"]
    longest_query: int
    longest_key: int


@dataclass(frozen=True, eq=False)
class Packing:
    """The documents of a packed row, in order.

    Args:
        documents: tokens of the prompt and of each response, for every document.
    """

    documents: tuple[tuple[int, ...], ...]
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Tokens of each document."""
        return [sum(document) for document in self.documents]

    @functools.cached_property
    def last_position(self) -> int:
        """The highest position of any token; positions restart after the prompt."""
        return max(document[0] + max(document[1:]) for document in self.documents) - 1

    def masks(self, device: torch.device, dtype: torch.dtype) -> list[Float[Tensor, "token token"]]:
        """An additive mask for each document, made once for all layers."""
        if (device, dtype) not in self._made:
            visible = [document_mask(document) for document in self.documents]
            additive = [torch.zeros(m.shape, dtype=dtype).masked_fill_(~m, -torch.inf) for m in visible]
            self._made[device, dtype] = [mask.to(device) for mask in additive]
        return cast(list[Tensor], self._made[device, dtype])

    def segments(self, device: torch.device) -> Segments:
        """Lengths and limits that a variable-length kernel takes, made once for all layers."""
        if device not in self._made:
            self._made[device] = self._segments(device)
        return cast(Segments, self._made[device])

    def _segments(self, device: torch.device) -> Segments:
        queries: list[int] = []
        keys: list[int] = []
        index: list[int] = []
        start = 0
        for prompt, *responses in self.documents:
            at = start
            for n in (prompt, *responses):
                own = range(at, at + n)
                seen = [*own] if at == start else [*range(start, start + prompt), *own]
                queries.append(n)
                keys.append(len(seen))
                index += seen
                at += n
            start = at

        def tensor(values: list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        ends_of_queries, ends_of_keys = ([0, *accumulate(lengths)] for lengths in (queries, keys))
        return Segments(
            tensor(ends_of_queries, torch.int32),
            tensor(ends_of_keys, torch.int32),
            tensor(index, torch.long),
            max(queries),
            max(keys),
        )


def document_mask(document: tuple[int, ...]) -> Bool[Tensor, "token token"]:
    """Mask of the earlier tokens of its document that each token sees: all but those of another response.

    >>> document_mask((1, 1, 2)).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    """
    part = torch.repeat_interleave(torch.arange(len(document)), torch.tensor(document))
    return torch.ones(len(part), len(part), dtype=torch.bool).tril() & ((part == 0) | (part[:, None] == part))


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let a model compute packed batches; without one, everything else runs on PyTorch's SDPA as before.

    Raises:
        UserError: the model runs on another kernel, or its family can't change it.
    """
    chosen = model.config._attn_implementation
    if chosen not in ("sdpa", PACKED_ATTENTION):
        raise UserError(
            f"{argument('settle_packing.packed')}=true needs {argument('CausalLM.attn_implementation')}=sdpa, got {chosen}; set "
            "one of the two"
        )
    try:
        model.set_attn_implementation(PACKED_ATTENTION)
    except ValueError as error:
        raise UserError(
            f"{argument('settle_packing.packed')}=true: {type(model).__name__} can't change its attention ({error}); set "
            f"{argument('settle_packing.packed')}=false"
        ) from error


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "row head token d_head"],
    key: Float[Tensor, "row key_head key d_head"],
    value: Float[Tensor, "row key_head key d_value"],
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "row token head d_value"], None]:
    """Attention inside each document of a packed row; with ``packing`` None, transformers' own SDPA attention.

    Raises:
        ValueError: an option that changes attention and isn't known here (soft capping, sinks, position biases).
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if unknown or options.get("dropout"):
        raise ValueError(f"packed attention does not support {', '.join(unknown) or 'dropout'}")
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # rotary embeddings leave float32 behind
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _by_segment(query, key, value, packing.segments(query.device), scaling), None
    return _by_document(query, key, value, packing, scaling), None


def _by_document(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None) -> Tensor:
    """One masked call of SDPA per document."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    masks = packing.masks(query.device, query.dtype)
    parts = zip(*(x.split(packing.sizes, dim=2) for x in (query, key, value)), masks, strict=True)
    attended = [F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling) for q, k, v, mask in parts]
    return rearrange(torch.cat(attended, dim=2), "row head token d -> row token head d")


def _by_segment(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """One call of a variable-length kernel."""
    q, k, v = (rearrange(x, "1 head token d -> token head d") for x in (query, key, value))
    attended = varlen_attn(
        q,
        k[segments.key_index],
        v[segments.key_index],
        segments.cumulative_queries,
        segments.cumulative_keys,
        segments.longest_query,
        segments.longest_key,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return cast(Tensor, attended)[None]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
