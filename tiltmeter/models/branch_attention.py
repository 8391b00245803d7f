"""Several continuations of one prompt side by side, the prompt's keys and values stored and read once.

A row holds one prompt and K *branches*. A decoding step gives the model one new token of each branch, all at the same
position; branch j sees the prompt and its own tokens, which is a tree mask. No mask over all branches' tokens is ever made:
scores against the prompt are one product for all branches, scores against a branch's own tokens one small product each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from tiltmeter.errors import Unsupported
from tiltmeter.models.layers import backbone

BRANCH_ATTENTION = "tiltmeter_branches"
"""Name under which transformers finds :func:`branch_attention`."""

_HARMLESS = ("position_ids", "use_cache", "output_attentions", "output_hidden_states", "is_causal", "cache_position")
"""Options that models hand to every kernel and that change nothing here."""


@dataclass
class _Layer:
    """Keys and values of one block."""

    prompt_keys: Float[Tensor, "row key_head prompt d_head"]
    prompt_values: Float[Tensor, "row key_head prompt d_value"]
    own_keys: Float[Tensor, "row key_head branch step d_head"]
    own_values: Float[Tensor, "row key_head branch step d_value"]

    def selected(self, rows: Tensor, branches: Tensor) -> "_Layer":
        own = [x.index_select(0, rows).index_select(2, branches) for x in (self.own_keys, self.own_values)]
        return _Layer(self.prompt_keys.index_select(0, rows), self.prompt_values.index_select(0, rows), *own)


@dataclass(eq=False)
class BranchCache(Cache):
    """Keys and values of prompts, padded on the right, and of what every branch has said since.

    Args:
        prompt: what a forward pass over the prompts left behind; it is taken over, nothing is copied.
        lengths: tokens of each prompt.
        n_branches: K.
        n_steps: decoding steps that there is room for.
    """

    prompt: DynamicCache
    lengths: Int[Tensor, " row"]
    n_branches: int
    n_steps: int
    step: int = 0
    """Tokens that every branch has behind it."""
    _masks: dict[int | None, tuple[Tensor, Tensor | None]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Make room for the branches."""
        super().__init__(layers=[])
        self._held = [self._layer(layer) for layer in self.prompt.layers]
        self.prompt = DynamicCache()

    def _layer(self, layer: object) -> _Layer:
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            raise Unsupported(
                f"model: a block keeps {type(layer).__name__} instead of keys and values, so a sweep can't share its prompts; "
                "generate with one strength at a time"
            )
        keys, values = layer.keys, layer.values
        shape = (*keys.shape[:2], self.n_branches, self.n_steps)
        return _Layer(keys, values, keys.new_empty(*shape, keys.shape[3]), values.new_empty(*shape, values.shape[3]))

    @property
    def positions(self) -> Int[Tensor, "row branch"]:
        """Position of the tokens that the next step takes."""
        return (self.lengths + self.step)[:, None].expand(-1, self.n_branches)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a block's new keys and values; the model calls this before it calls :func:`branch_attention`."""
        layer = self._held[layer_idx]
        layer.own_keys[:, :, :, self.step] = key_states
        layer.own_values[:, :, :, self.step] = value_states
        return key_states, value_states

    def layer(self, index: int) -> _Layer:
        """Keys and values held of one block, without the room for later steps."""
        held, n = self._held[index], self.step + 1
        return _Layer(held.prompt_keys, held.prompt_values, held.own_keys[:, :, :, :n], held.own_values[:, :, :, :n])

    def hidden_from(
        self, window: int | None, n_prompt: int
    ) -> tuple[Bool[Tensor, "row 1 1 prompt"], Bool[Tensor, " own"] | None]:
        """Masks of the prompt tokens and own tokens that the next tokens do not see: padding, and what a sliding window leaves."""
        if window not in self._masks:
            device = self.lengths.device
            at, last = torch.arange(n_prompt, device=device), self.lengths[:, None]
            unseen = at >= last
            own = None
            if window is not None:
                unseen = unseen | (last + self.step - at >= window)
                own = torch.arange(self.step, -1, -1, device=device) >= window if self.step >= window else None
            self._masks[window] = (unseen[:, None, None], own)
        return self._masks[window]

    def advance(self) -> None:
        """Close a step that every block has done."""
        self.step += 1
        self._masks.clear()

    def select(self, rows: Int[Tensor, " kept_row"], branches: Int[Tensor, " kept_branch"]) -> None:
        """Forget all other rows and branches."""
        self._held = [layer.selected(rows, branches) for layer in self._held]
        self.lengths, self.n_branches = self.lengths[rows], len(branches)
        self._masks.clear()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def branch_attention(
    module: nn.Module,
    query: Float[Tensor, "row head branch d_head"],
    key: Float[Tensor, "row key_head branch d_head"],
    value: Float[Tensor, "row key_head branch d_value"],
    attention_mask: Tensor | None,
    *,
    branches: BranchCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Float[Tensor, "row branch head d_value"], None]:
    """Attention of one new token a branch to the prompt and to the branch's own tokens, this one included.

    Raises:
        Unsupported: an option that changes attention and isn't known here (sinks, position biases).
    """
    unknown = [name for name, value in options.items() if value is not None and name not in _HARMLESS]
    if unknown or dropout:
        raise Unsupported(
            f"model: its attention has {', '.join(unknown) or 'dropout'}, which branches of one prompt don't support; generate "
            "with one strength at a time"
        )
    held = branches.layer(module.layer_idx)  # type: ignore[arg-type]
    n_prompt, n_heads = held.prompt_keys.shape[2], held.prompt_keys.shape[1]
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    query = rearrange(query, "row (head group) branch d -> row head group branch d", head=n_heads)
    of_prompt = rearrange(query, "row head group branch d -> row head (group branch) d")
    of_own = rearrange(query, "row head group branch d -> row head branch group d")
    on_prompt = (of_prompt @ held.prompt_keys.mT).unflatten(2, query.shape[2:4])
    on_own = rearrange(of_own @ held.own_keys.mT, "row head branch group own -> row head group branch own")
    scores = torch.cat([on_prompt, on_own], dim=-1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    unseen, own_unseen = branches.hidden_from(sliding_window, n_prompt)
    scores[..., :n_prompt].masked_fill_(unseen[:, None], -torch.inf)
    if own_unseen is not None:
        scores[..., n_prompt:].masked_fill_(own_unseen, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    prompt_weights, own_weights = weights.split([n_prompt, weights.shape[-1] - n_prompt], dim=-1)
    from_prompt = (prompt_weights.flatten(2, 3) @ held.prompt_values).unflatten(2, query.shape[2:4])
    from_own = rearrange(own_weights, "row head group branch own -> row head branch group own") @ held.own_values
    attended = from_prompt + rearrange(from_own, "row head branch group d -> row head group branch d")
    return rearrange(attended, "row head group branch d -> row branch (head group) d"), None


def run_branches(
    model: PreTrainedModel, tokens: Int[Tensor, "row branch"], cache: BranchCache
) -> Float[Tensor, "row branch d_model"]:
    """Hidden states after the final norm at the next token of every branch; call inside :func:`use_branch_attention`."""
    out = backbone(model)(
        input_ids=tokens,
        position_ids=cache.positions,
        attention_mask=tokens.new_ones(1, 1, 1, 1, dtype=torch.bool),  # four dimensions: the model makes none itself
        past_key_values=cache,
        use_cache=True,
        branches=cache,
    )
    cache.advance()
    hidden: Tensor = out.last_hidden_state
    return hidden


@contextmanager
def use_branch_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model takes one new token a branch, with ``past_key_values`` and ``branches`` a :class:`BranchCache`.

    Raises:
        Unsupported: the model's family can't change its attention.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(BRANCH_ATTENTION)
    if model.config._attn_implementation != BRANCH_ATTENTION:
        raise Unsupported(
            f"model: {type(model).__name__} can't change its attention, so a sweep can't share its prompts; generate with one "
            "strength at a time"
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(BRANCH_ATTENTION, branch_attention)
AttentionMaskInterface.register(BRANCH_ATTENTION, sdpa_mask)
