"""Log-probabilities of responses: completion positions only, the unembedding in chunks, sums in float32 or better."""

import math
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tiltmeter.errors import UserError, argument
from tiltmeter.models.cpu_linear import linear
from tiltmeter.models.layers import Unembedding, backbone, sliding_window, unembedding
from tiltmeter.pairs.batch import PAD, PreferenceBatch, attention_mask
from tiltmeter.pairs.packing import PACKED_ATTENTION

_CHUNK_TOKENS, _CHUNK_LOGITS = 1024, 2**25


def default_chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits exist at a time, unless something else is asked for: 1,024, fewer above 32,768 words.

    So logits never take more than 128 MB in float32, and products stay large enough to be fast.

    >>> default_chunk_tokens(4_096), default_chunk_tokens(131_072)
    (1024, 256)
    """
    return max(1, min(_CHUNK_TOKENS, _CHUNK_LOGITS // vocab_size))


def sequence_log_probs(
    model: PreTrainedModel, batch: PreferenceBatch, *, chunk_tokens: int | None = None
) -> Float[Tensor, " sequence"]:
    """log π(y|x) in nats, summed over the response's tokens, for every sequence of a batch.

    Runs the backbone once, then the unembedding on target positions only. Sequences are ordered as in
    :class:`~tiltmeter.pairs.batch.PreferenceBatch`: chosen first, then rejected.
    """
    hidden = target_hidden_states(model, batch)
    token_logps = token_log_probs(hidden, unembedding(model), batch.target_ids, chunk_tokens=chunk_tokens)
    return sum_by_sequence(token_logps, batch.target_sequences, batch.n_sequences)


def target_hidden_states(model: PreTrainedModel, batch: PreferenceBatch) -> Float[Tensor, "target d_model"]:
    """Hidden state after the final norm at the place that predicts each target."""
    return rearrange(run_backbone(model, batch), "row token d -> (row token) d")[batch.target_rows]


def run_backbone(model: PreTrainedModel, batch: PreferenceBatch) -> Float[Tensor, "row token d_model"]:
    """Hidden states after the final norm of every token of a batch, padding included; the unembedding does not run."""
    out = backbone(model)(**model_inputs(model, batch))
    return cast(Tensor, out.last_hidden_state)


def model_inputs(model: PreTrainedModel, batch: PreferenceBatch) -> dict[str, Any]:
    """A batch as keyword arguments of a model or its backbone."""
    inputs = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": _model_mask(model, batch),
        "use_cache": False,
    }
    return inputs if batch.packing is None else inputs | {"packing": batch.packing}


def sum_by_sequence(
    token_logps: Float[Tensor, " target"], target_sequences: Int[Tensor, " target"], n_sequences: int
) -> Float[Tensor, " sequence"]:
    """Sum token log-probs within each sequence in float64; the result has the tokens' dtype.

    A float32 sum of 4,000 tokens drifts by 0.01 nats.

    >>> sum_by_sequence(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 1, 1]), 2).tolist()
    [-1.0, -6.0]
    """
    dtype = token_logps.dtype if token_logps.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    sums = token_logps.new_zeros(n_sequences, dtype=dtype).index_add(0, target_sequences, token_logps.to(dtype))
    return sums.to(token_logps.dtype)


def token_log_probs(
    hidden: Float[Tensor, "target d_model"],
    head: Unembedding,
    target_ids: Int[Tensor, " target"],
    *,
    chunk_tokens: int | None = None,
) -> Float[Tensor, " target"]:
    """log softmax(logits)[target] for each row of hidden states, never holding more than a chunk of logits.

    Logits are recomputed chunk by chunk in the backward pass, so peak memory is chunk_tokens × vocab whatever the number
    of targets (chunk_tokens None: :func:`default_chunk_tokens`).
    The softmax and the gradient of the weight accumulate in float32 (float64 for float64 input) whatever
    the dtype of the matrix product, which follows autocast. A frozen unembedding costs no weight gradient.
    """
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(len(head.weight))
    if chunk_tokens < 1:
        raise ValueError(f"token_log_probs: chunk_tokens: expected at least 1, got {chunk_tokens}")
    weight, bias = head.weight, head.bias
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    elif hidden.dtype != weight.dtype:
        hidden = hidden.to(weight.dtype)
    args = (hidden, weight, bias, target_ids, head.scale, head.soft_cap, chunk_tokens)
    return cast(Tensor, _TokenLogProbs.apply(*args))


def scale_and_cap(raw: Float[Tensor, "*row vocab"], head: Unembedding) -> Float[Tensor, "*row vocab"]:
    """The logits of a model from h Wᵀ + b, in float32 or better: cap · tanh(scale · raw / cap).

    >>> head = Unembedding(torch.eye(2), scale=0.5, soft_cap=1.0)
    >>> [round(x, 3) for x in scale_and_cap(torch.tensor([0.0, 2.0]), head).tolist()]
    [0.0, 0.762]
    """
    return _scale_and_cap(raw, head.scale, head.soft_cap)[0]


class _TokenLogProbs(torch.autograd.Function):
    """∂ log p_t / ∂ logits = onehot(t) − softmax(logits), with logits recomputed per chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        scale: float,
        soft_cap: float | None,
        chunk: int,
    ) -> Tensor:
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        logps = torch.empty(len(hidden), dtype=accumulate, device=hidden.device)
        log_normalizer = torch.empty_like(logps)
        for at in range(0, len(hidden), chunk):
            rows = slice(at, at + chunk)
            logits, _ = _logits(hidden[rows], weight, bias, scale, soft_cap)
            log_normalizer[rows] = logits.logsumexp(-1)
            logps[rows] = logits.gather(-1, target_ids[rows, None])[:, 0] - log_normalizer[rows]
        ctx.save_for_backward(hidden, weight, bias, target_ids, log_normalizer)
        ctx.scale, ctx.soft_cap, ctx.chunk = scale, soft_cap, chunk
        return logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_logps,) = grad_outputs
        hidden, weight, bias, target_ids, log_normalizer = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=grad_logps.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad_logps.dtype) if needs_bias else None
        for at in range(0, len(hidden), ctx.chunk):
            rows = slice(at, at + ctx.chunk)
            logits, slope = _logits(hidden[rows], weight, bias, ctx.scale, ctx.soft_cap)
            grad = logits.sub_(log_normalizer[rows, None]).exp_().neg_()  # −softmax, in the logits' own memory
            grad.scatter_add_(1, target_ids[rows, None], torch.ones_like(grad[:, :1]))
            grad.mul_(grad_logps[rows, None])
            if slope is not None:
                grad.mul_(slope)
            if grad_hidden is not None:
                grad_hidden[rows] = grad.to(weight.dtype) @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[rows].to(grad.dtype))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, soft_cap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits in float32 or better, and ∂ logits / ∂ (h Wᵀ + b) where that isn't 1."""
    raw = linear(hidden, weight, None if bias is None else bias.to(weight.dtype))
    return _scale_and_cap(raw, scale, soft_cap)


def _scale_and_cap(raw: Tensor, scale: float, soft_cap: float | None) -> tuple[Tensor, Tensor | None]:
    logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
    slope = None
    if scale != 1.0:
        logits = logits * scale
        slope = torch.full_like(logits[..., :1], scale)
    if soft_cap is not None:
        squashed = torch.tanh(logits / soft_cap)
        logits = squashed * soft_cap
        slope = (1 - squashed**2) * (1.0 if slope is None else slope)
    return logits, slope


def _model_mask(model: PreTrainedModel, batch: PreferenceBatch) -> Tensor:
    """The batch's mask in the form the attention kernel takes: boolean for SDPA, additive for eager.

    Layouts without sharing are plain causal rows padded on the right, which every kernel knows from a 2-D mask.

    A packed row needs none, and a mask of four dimensions keeps the model from making one of token × token.

    Raises:
        UserError: packed or ``shared_prefix``, and a response reaches beyond the sliding window, which only the model
            can apply.
    """
    if batch.packing is not None:
        if batch.packing.last_position >= (sliding_window(model) or math.inf):
            raise UserError(
                f"{argument('settle_packing.packed')}=true: this model sees only the last {sliding_window(model)} tokens and a "
                f"pair is longer; use {argument('settle_packing.packed')}=false "
                f"{argument('settle_packing.layout')}=concatenated or a smaller {argument('settle_packing.max_length')}"
            )
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    if batch.layout != "shared_prefix":
        return (batch.segments != PAD).long()
    window = sliding_window(model)
    if window is not None and batch.input_ids.shape[1] > window and int(batch.position_ids.max()) >= window:
        raise UserError(
            f"{argument('settle_packing.layout')}=shared_prefix: this model sees only the last {window} tokens and a pair is "
            f"longer; use {argument('settle_packing.layout')}=concatenated or a smaller {argument('settle_packing.max_length')}"
        )
    visible = attention_mask(batch.segments)
    if model.config._attn_implementation in ("sdpa", PACKED_ATTENTION):
        return visible
    blocked = torch.finfo(model.dtype).min
    return torch.zeros(visible.shape, dtype=model.dtype, device=visible.device).masked_fill_(~visible, blocked)
