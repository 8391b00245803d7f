"""Teacher-forced logits under many steering vectors for little more than one forward pass.

Adding a vector at a site changes nothing before it, so what lies before is computed once for all vectors:

- ``final_post_norm``: one forward pass serves all, since the unembedding is linear: logits(λ) = z + λ W_U v, soft cap after;
- ``final_pre_norm``: one pass through the backbone, then norm and unembedding for each vector;
- ``layer_l``: one pass, then the blocks above l for each vector (:func:`sweep_cost`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from tiltmeter.models.cpu_linear import fast_linear, linear
from tiltmeter.models.hooks import hook_site
from tiltmeter.models.layers import (
    FINAL_POST_NORM,
    Unembedding,
    decoder_blocks,
    final_norm,
    site_depth,
    unembedding,
)
from tiltmeter.pairs.batch import PAD, PROMPT, PreferenceBatch
from tiltmeter.pairs.log_probs import default_chunk_tokens, run_backbone, scale_and_cap
from tiltmeter.steering.intervene import Intervention, steer
from tiltmeter.steering.vector import check_site_and_width

_HIDDEN_AT_A_TIME = 2**25
"""Numbers of hidden states that are held for all shifts together: 128 MB in float32."""


class SteeredLogits(NamedTuple):
    """Logits of some targets of a batch under every shift."""

    logits: Float[Tensor, "shift target vocab"]
    """In float32 or better."""
    targets: Int[Tensor, " target"]
    """Indices of these targets among the batch's."""

    def log_probs(self, batch: PreferenceBatch) -> Float[Tensor, "shift target"]:
        """log π(token | what is before it) of these targets, in nats."""
        ids = batch.target_ids[self.targets].expand(len(self.logits), -1)
        return self.logits.gather(-1, ids[..., None])[..., 0] - self.logits.logsumexp(-1)


class SteeredSums(NamedTuple):
    """Sums over the logits of some targets of a batch under every shift: numbers a target, in float64."""

    log_probs: Float[Tensor, "shift target"]
    """log π_steered(token | what is before it), nats."""
    kl_from_goal: Float[Tensor, "shift target"]
    """KL(goal ‖ steered), nats."""
    kl_from_start: Float[Tensor, "shift target"]
    """KL(unsteered ‖ steered), nats."""
    targets: Int[Tensor, " target"]
    """Indices of these targets among the batch's."""


class _Call(NamedTuple):
    """Arguments of a block besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Prefix(NamedTuple):
    """Keys, values and states that one unsteered pass leaves behind for all shifts."""

    hidden: Float[Tensor, "row token d_model"]
    """At the site."""
    final: Float[Tensor, "row token d_model"]
    """After the final norm."""
    calls: list[_Call]
    """Calls of the blocks above the site."""


def sweep_cost(n_layers: int, layer: int, n_shifts: int) -> float:
    """Passes through all blocks that a sweep of ``n_shifts`` vectors other than 0 takes at block ``layer``'s output.

    1 + Λ (L−1−l)/L with l counted from 0, as blocks l+1 … L−1 run for each vector. The unembedding comes on top, at the
    targets only, once a vector.

    >>> sweep_cost(4, 0, 20), sweep_cost(4, 3, 20)
    (16.0, 1.0)
    """
    return 1 + n_shifts * (n_layers - 1 - layer) / n_layers


@torch.no_grad()
def steered_logits(
    model: PreTrainedModel,
    batch: PreferenceBatch,
    *,
    site: str,
    shifts: Float[Tensor, "shift d_model"],
    tokens: str | Bool[Tensor, "row token"] = "all",
    tokens_per_batch: int = 4096,
) -> Iterator[SteeredLogits]:
    """Logits at every target of a batch while ``shifts[j]`` is added at a site, for all j, some targets at a time.

    The model's training mode is left as it is; switch dropout off before.

    Args:
        site: where (:mod:`tiltmeter.models.layers`).
        shifts: what is added, λ v for every λ and vector; zeros for the model as it is, which costs nothing.
        tokens: to which tokens' hidden states, as for :class:`tiltmeter.steering.intervene.Intervention`; ``new``: the responses'.
        tokens_per_batch: shifts × rows × tokens that are computed together, at most; at least one shift. Few suit a CPU's
            caches (a third faster than 16,384 on the model of benchmarks/sweep.py), more a GPU.

    Yields:
        Never more logits at a time than :func:`tiltmeter.pairs.log_probs.default_chunk_tokens` rows, or one a shift.

    Raises:
        UserError: an unknown site or choice of tokens; shifts of another width, or that are not finite.
        ValueError: a mask of another batch.
    """
    check_site_and_width(model, site, shifts.shape[1])
    Intervention(site, shifts, tokens=tokens)  # checks its arguments
    head = unembedding(model)
    shifts = shifts.to(head.weight.device, torch.promote_types(head.weight.dtype, torch.float32))
    reached = reached_tokens(batch, tokens)
    if site == FINAL_POST_NORM:
        with fast_linear(model):
            hidden = run_backbone(model, batch).flatten(0, 1)[batch.target_rows][None]
        moves = linear(shifts, head.weight.to(shifts.dtype))
    else:
        hidden = _hidden_at_targets(model, batch, site, shifts, reached, tokens_per_batch)
        moves = None
    yield from _logits_of(hidden, batch, head, moves=moves, on=reached.flatten()[batch.target_rows])


@torch.no_grad()
def intervened_logits(
    model: PreTrainedModel, batch: PreferenceBatch, interventions: Sequence[Intervention | None]
) -> Iterator[SteeredLogits]:
    """Logits at every target of a batch under each intervention, for operators that are no shift: one pass each.

    Args:
        interventions: None: the model as it is; tokens as a mask, or ``all``.

    Raises:
        UserError: an intervention that doesn't fit the model.
    """
    head, hidden = unembedding(model), []
    for one in interventions:
        with steer(model, [] if one is None else one), fast_linear(model):
            hidden.append(run_backbone(model, batch).flatten(0, 1)[batch.target_rows])
    yield from _logits_of(torch.stack(hidden), batch, head)


@torch.no_grad()
def moved_logits(
    model: PreTrainedModel,
    batch: PreferenceBatch,
    *,
    site: str,
    moves: Sequence[Float[Tensor, "row token d_model"]],
) -> Iterator[SteeredLogits]:
    """Logits at every target, of the model as it is and then under each move, which every token has one of its own of.

    Args:
        site: where (:mod:`tiltmeter.models.layers`).
        moves: what is added to the hidden states; zeros where nothing is.

    Raises:
        UserError: an unknown site, or moves of another width.
    """
    prefix, head = _run_prefix(model, batch, site), unembedding(model)
    hidden = [prefix.final.flatten(0, 1)[batch.target_rows]]
    for move in moves:
        check_site_and_width(model, site, move.shape[-1])
        if site == FINAL_POST_NORM:
            hidden.append((prefix.final + move).to(prefix.final.dtype).flatten(0, 1)[batch.target_rows])
        else:
            hidden.append(_run_above(model, prefix, move[None], batch.target_rows)[0])
    yield from _logits_of(torch.stack(hidden), batch, head)


@torch.no_grad()
def hidden_at(model: PreTrainedModel, batch: PreferenceBatch, site: str) -> Float[Tensor, "row token d_model"]:
    """Hidden states of every token of a batch at a site."""
    return _run_prefix(model, batch, site).hidden


def intervened_sums(
    model: PreTrainedModel,
    batch: PreferenceBatch,
    interventions: Sequence[Intervention | None],
    goal_logits: Callable[[Int[Tensor, " some"]], Float[Tensor, "some vocab"]],
) -> Iterator[SteeredSums]:
    """Log-probs and KL divergences, as :func:`steered_sums`, under each intervention; they are measured from the model as it is."""
    for part in intervened_logits(model, batch, [None, *interventions]):
        yield _sums_of_logits(part, goal_logits(part.targets), batch)


def _logits_of(
    hidden: Float[Tensor, "one_or_shift target d_model"],
    batch: PreferenceBatch,
    head: Unembedding,
    *,
    moves: Float[Tensor, "shift vocab"] | None = None,
    on: Bool[Tensor, " target"] | None = None,
) -> Iterator[SteeredLogits]:
    """Logits of states behind the final norm, as many targets at a time as logits of all shifts may be held of.

    Args:
        moves: shifts of logits instead of states, which then have one row for all shifts.
        on: targets that they reach.
    """
    at_a_time = max(1, default_chunk_tokens(len(head.weight)) // len(hidden if moves is None else moves))
    for targets in torch.arange(len(batch.target_ids), device=batch.target_ids.device).split(at_a_time):
        raw = linear(hidden[:, targets], head.weight, head.bias)
        if moves is not None and on is not None:
            raw = raw + moves[:, None] * on[targets, None]
        yield SteeredLogits(scale_and_cap(raw, head), targets)


@torch.no_grad()
def steered_sums(
    model: PreTrainedModel,
    batch: PreferenceBatch,
    *,
    site: str,
    shifts: Float[Tensor, "shift d_model"],
    goal_logits: Callable[[Int[Tensor, " some"]], Float[Tensor, "some vocab"]],
    tokens: str | Bool[Tensor, "row token"] = "all",
    tokens_per_batch: int = 4096,
) -> Iterator[SteeredSums]:
    """Log-probs and KL divergences under many shifts, for when nobody needs the logits themselves: hundreds of random vectors.

    At ``final_post_norm`` a shift is a bias b = W_U v on the logits, the same at every target, and with p = softmax(z)

        logsumexp(z + b) = logsumexp(z) + log1p(Σ_j p_j expm1(b_j)),   KL(q ‖ steered) = KL(q ‖ p) − Σ_j q_j b_j + log1p(…),

    so all targets and shifts are three matrix products. Elsewhere, and under a soft cap, :func:`steered_logits` are summed up.

    Args:
        goal_logits: of the model that KL is measured from, at some targets.
        site, shifts, tokens, tokens_per_batch: as for :func:`steered_logits`.

    Raises:
        UserError, ValueError: as :func:`steered_logits`.
    """
    check_site_and_width(model, site, shifts.shape[1])
    head = unembedding(model)
    if site == FINAL_POST_NORM and head.soft_cap is None:
        yield from _bias_sums(model, batch, shifts, goal_logits, reached_tokens(batch, tokens))
        return
    held = max(1, _HIDDEN_AT_A_TIME // max(1, len(batch.target_ids) * shifts.shape[1]))
    parts = []
    for some in shifts.split(held):
        with_none = torch.cat([torch.zeros_like(some[:1]), some])
        found = steered_logits(
            model, batch, site=site, shifts=with_none, tokens=tokens, tokens_per_batch=tokens_per_batch
        )
        sums = [_sums_of_logits(part, goal_logits(part.targets), batch) for part in found]
        parts.append(SteeredSums(*(torch.cat(columns, dim=-1) for columns in zip(*sums, strict=True))))
    log_probs, from_goal, from_start = (torch.cat(columns) for columns in list(zip(*parts, strict=True))[:3])
    yield SteeredSums(log_probs, from_goal, from_start, parts[0].targets)


def _sums_of_logits(part: SteeredLogits, goal: Float[Tensor, "target vocab"], batch: PreferenceBatch) -> SteeredSums:
    """The first shift is none. Passes over the logits are what this costs, so there are few, in the logits' own precision."""
    start, goal = (logits.double().log_softmax(-1) for logits in (part.logits[0], goal))
    p, q = start.exp(), goal.exp()
    between = (q * (goal - start)).sum(-1)
    bias = part.logits[1:] - part.logits[0]  # small beside the logits, so that what they share costs no digits
    ids = batch.target_ids[part.targets]
    own = start.gather(1, ids[:, None])[:, 0] + bias.gather(-1, ids.expand(len(bias), -1)[..., None])[..., 0]
    narrow = torch.stack([p, q], dim=-1).to(bias.dtype)
    along = torch.einsum("stv,tvk->kst", bias, narrow).double()
    change = torch.einsum("stv,tv->st", bias.expm1(), narrow[..., 0]).double()
    normalizer = _log1p(change, lambda shift, target: (start[target] + bias[shift, target].double()).logsumexp(-1))
    from_start, from_goal = normalizer - along
    return SteeredSums(own - normalizer, between + from_goal, from_start, part.targets)


def _bias_sums(
    model: PreTrainedModel,
    batch: PreferenceBatch,
    shifts: Float[Tensor, "shift d_model"],
    goal_logits: Callable[[Int[Tensor, " some"]], Float[Tensor, "some vocab"]],
    reached: Bool[Tensor, "row token"],
) -> Iterator[SteeredSums]:
    head = unembedding(model)
    with fast_linear(model):
        hidden = run_backbone(model, batch).flatten(0, 1)[batch.target_rows]
    wide = shifts.to(head.weight.device, torch.promote_types(head.weight.dtype, torch.float32))
    bias = head.scale * linear(wide, head.weight.to(wide.dtype)).double()
    grown = bias.expm1()
    on = reached.flatten()[batch.target_rows]
    at_a_time = max(1, default_chunk_tokens(len(head.weight)) // 4)  # float64, several at once
    for targets in torch.arange(len(batch.target_ids), device=on.device).split(at_a_time):
        start = scale_and_cap(linear(hidden[targets], head.weight, head.bias), head).double().log_softmax(-1)
        goal = goal_logits(targets).double().log_softmax(-1)
        p, q = start.exp(), goal.exp()
        between = (q * (goal - start)).sum(-1)
        normalizer = _log1p(grown @ p.T, lambda i, j, start=start: (start[j] + bias[i]).logsumexp(-1))  # type: ignore[misc]
        ids = batch.target_ids[targets]
        moved = normalizer - bias @ p.T, normalizer - bias @ q.T, bias[:, ids] - normalizer
        from_start, from_goal, own = (torch.where(on[targets], x, 0.0) for x in moved)
        yield SteeredSums(start.gather(1, ids[:, None])[:, 0] + own, between + from_goal, from_start, targets)


def _log1p(
    change: Float[Tensor, "shift target"], exactly: Callable[[int, int], Tensor]
) -> Float[Tensor, "shift target"]:
    """log1p of Σ_j p_j expm1(b_j); the few sums that overflow or come close to −1 are taken ``exactly``, one by one."""
    found = change.log1p()
    for shift, target in (~(change.isfinite() & (change > -0.99))).nonzero().tolist():
        found[shift, target] = exactly(shift, target)
    return found


def reached_tokens(batch: PreferenceBatch, tokens: str | Tensor) -> Bool[Tensor, "row token"]:
    """Tokens of a batch that are steered: a mask, or what ``all``, ``new`` or ``prompt`` means there."""
    if isinstance(tokens, Tensor):
        if tokens.shape != batch.segments.shape:
            raise ValueError(f"tokens: a mask of {list(tokens.shape)} for a batch of {list(batch.segments.shape)}")
        return tokens
    is_prompt, is_real = batch.segments == PROMPT, batch.segments != PAD
    return {"all": is_real, "new": is_real & ~is_prompt, "prompt": is_prompt}[tokens]


def _hidden_at_targets(
    model: PreTrainedModel,
    batch: PreferenceBatch,
    site: str,
    shifts: Float[Tensor, "shift d_model"],
    reached: Bool[Tensor, "row token"],
    tokens_per_batch: int,
) -> Float[Tensor, "shift target d_model"]:
    """Hidden states after the final norm at the targets, under every shift; zeros take those of the prefix pass."""
    prefix = _run_prefix(model, batch, site)
    unsteered = prefix.final.flatten(0, 1)[batch.target_rows]
    hidden = unsteered.new_empty(len(shifts), *unsteered.shape)
    moved = shifts.any(1)
    hidden[~moved] = unsteered
    if not moved.any():  # blocks take no batch of none
        return hidden
    n_at_once = max(1, tokens_per_batch // reached.numel())
    if batch.packing is not None:
        n_at_once = 1  # kernels take one packed row
    for some in moved.nonzero()[:, 0].split(n_at_once):
        moves = shifts[some][:, None, None] * reached[:, :, None]
        hidden[some] = _run_above(model, prefix, moves, batch.target_rows)
    return hidden


def _run_prefix(model: PreTrainedModel, batch: PreferenceBatch, site: str) -> _Prefix:
    """One pass through the backbone that keeps the hidden states at a site and how the blocks above were called."""
    blocks = decoder_blocks(model)
    depth = site_depth(site, len(blocks))
    at_site: list[Tensor] = []
    calls: list[_Call] = []

    def keep_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_Call(args[1:], kwargs))

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled block would not see its new hooks
        stack.enter_context(fast_linear(model))
        stack.callback(hook_site(model, site, at_site.append).remove)
        for block in blocks[depth + 1 :]:
            stack.callback(block.register_forward_pre_hook(keep_call, with_kwargs=True).remove)
        final = run_backbone(model, batch)
    return _Prefix(at_site[0], final, calls)


def _run_above(
    model: PreTrainedModel,
    prefix: _Prefix,
    moves: Float[Tensor, "shift row token d_model"],
    target_rows: Int[Tensor, " target"],
) -> Float[Tensor, "shift target d_model"]:
    """The blocks above the site with rows (shift, row), then the final norm at the targets."""
    n_shifts, n_rows = moves.shape[:2]
    hidden = (prefix.hidden + moves).to(prefix.hidden.dtype).flatten(0, 1)
    blocks = decoder_blocks(model)
    with torch.compiler.set_stance("force_eager"), fast_linear(model):
        for block, call in zip(blocks[len(blocks) - len(prefix.calls) :], prefix.calls, strict=True):
            args, kwargs = _repeat((call.args, call.kwargs), n_rows, n_shifts)
            hidden = _first(block(hidden, *args, **kwargs))
    at_targets = hidden.unflatten(0, (n_shifts, n_rows)).flatten(1, 2)[:, target_rows]
    return cast(Tensor, final_norm(model)(at_targets))


def _repeat(inputs: Any, n_rows: int, times: int) -> Any:
    """Arguments of a block for ``times`` as many rows: what has a line a row is repeated, the rest broadcasts."""

    def repeated(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim < 2 or len(x) != n_rows or n_rows == 1:
            return x
        return x.repeat(times, *[1] * (x.ndim - 1))

    return pytree.tree_map(repeated, inputs)


def _first(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
