"""Does this model compute what this project assumes? Two small pairs, before training, against the model's own logits.

A model family may read positions, masks or its head in a way that no flag announces (ALiBi, state-space layers, scaled
heads); then log-probs would be wrong without any error. A check costs six short forwards.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiltmeter.errors import UserError
from tiltmeter.models.layers import sliding_window
from tiltmeter.pairs.batch import Layout, TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.pairs.packing import use_packed_attention

LOG_PROB_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest accepted difference of a log-prob, as a share of its size."""
_SOUNDS_RANDOM = ("drop", "noise", "jitter", "stochastic", "random")


def settle_packing(model: PreTrainedModel, layout: Layout, packed: bool | None, *, max_length: int) -> bool:
    """Decide whether batches are packed, prepare the model for it, and verify what will be computed.

    Args:
        layout: that of the batches.
        packed: None: where the model runs on SDPA, sees every pair whole and passes :func:`verify_layout`.
        max_length: longest prompt + response in tokens.

    Raises:
        UserError: the model can't do what is asked.
    """
    if packed is None:
        kernel = model.config._attn_implementation
        if kernel == "sdpa" and max_length <= (sliding_window(model) or math.inf):
            try:
                return settle_packing(model, layout, True, max_length=max_length)
            except UserError:
                model.set_attn_implementation(kernel)
        packed = False
    if packed:
        use_packed_attention(model)
    verify_layout(model, layout, packed=packed)
    return packed


@torch.no_grad()
def verify_layout(model: PreTrainedModel, layout: Layout, *, packed: bool = False) -> None:
    """Compare the log-probs of two pairs of random tokens in a layout with the model's own logits, a sequence at a time.

    Raises:
        UserError: they differ, or the model can't run the layout.
    """
    pairs = random_pairs(model)
    own = [_own_log_prob(model, pair.prompt_ids, response) for pair in pairs for response in pair[1:]]
    batch = collate_pairs(pairs, pair_index=range(len(pairs)), layout=layout, packed=packed).to(model.device)
    name = f"model: {type(model).__name__}"
    shown = f"datamodule.layout={layout}" + (" with datamodule.packed=true" if packed else "")
    try:
        ours = sequence_log_probs(model, batch).view(-1, len(pairs)).T.flatten().tolist()
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} cannot run {shown} ({reason[:200]}); {_advice(layout, packed)}") from error
    own = own[::2] if layout == "chosen_only" else own
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, own, strict=True))
    if not worst <= _tolerance(model):
        raise UserError(
            f"{name} gives other log-probs in {shown} than by its own logits (a relative difference of {worst:.1g}); "
            f"{_advice(layout, packed)}"
        )


def _tolerance(model: PreTrainedModel) -> float:
    """Relative difference of log-probs that the precision of the model's arithmetic explains."""
    kind = model.device.type
    computed_in = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return LOG_PROB_TOLERANCE.get(computed_in, 5e-2)


def best_layout(model: PreTrainedModel, pairs: Sequence[TokenizedPair]) -> Layout:
    """The layout ``shared_prefix`` where a model computes it rightly and sees the pairs whole, else ``concatenated``.

    The latter for ALiBi, state-space layers …, and for pairs that are longer than a sliding window.
    """
    longest = max((len(pair.prompt_ids) + max(map(len, pair[1:])) for pair in pairs), default=0)
    if longest > (sliding_window(model) or math.inf):
        return "concatenated"
    try:
        verify_layout(model, "shared_prefix")
    except UserError:
        return "concatenated"
    return "shared_prefix"


@torch.no_grad()
def verify_no_randomness(model: PreTrainedModel) -> None:
    """Run one batch again and again in training mode: policy and reference must be the same function, so that step 0 is ln 2.

    On a CPU all passes must be equal bit for bit; elsewhere sums may be taken in any order, and what counts is whether random
    numbers were drawn, too. Two short passes, more and longer ones where numbers were drawn. The random state is left as it was.

    Raises:
        UserError: the passes differ; names the module that draws, and settings that may be the reason.
    """
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        model.train()
        with torch.random.fork_rng(devices=devices):
            before = _random_state(model)
            same = _passes_agree(model, random_pairs(model), times=2)
            is_drawn = not torch.equal(_random_state(model), before)
            if same and is_drawn:  # harmlessly, or with an effect that is rare
                same = _passes_agree(model, random_pairs(model, lengths=((24, 8, 8),) * 8), times=6)
            if same or (model.device.type != "cpu" and not is_drawn):
                return
            where = _who_draws(model)
    finally:
        model.train(was_training)
    suspects = ", ".join(f"{name} ({value:g})" for name, value in _settings(model.config) if value)
    raise UserError(
        f"model: {type(model).__name__} is random in training mode{where and f' ({where})'}, so the policy before its first step "
        f"would not be its reference; set {suspects or 'what makes it so'} to 0 in its configuration, where that "
        "doesn't help this family is not supported"
    )


def _passes_agree(model: PreTrainedModel, pairs: Sequence[TokenizedPair], *, times: int) -> bool:
    batch = collate_pairs(pairs, pair_index=range(len(pairs)), layout="concatenated").to(model.device)
    first, *others = [sequence_log_probs(model, batch) for _ in range(times)]
    return all(torch.equal(first, other) for other in others)


def _settings(config: Any, path: str = "") -> list[tuple[str, float]]:
    """Settings whose name sounds random, with those of the configurations inside."""
    found: list[tuple[str, float]] = []
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            found += _settings(value, f"{path}{name}.")
        elif isinstance(value, float) and any(word in name for word in _SOUNDS_RANDOM):
            found.append((path + name, value))
    return found


def _random_state(model: PreTrainedModel) -> Tensor:
    return torch.cuda.get_rng_state(model.device) if model.device.type == "cuda" else torch.get_rng_state()


def _who_draws(model: PreTrainedModel) -> str:
    """Name of the innermost module that draws random numbers first; empty where none does."""
    names = {module: name for name, module in model.named_modules()}
    states: dict[nn.Module, Tensor] = {}
    found: list[str] = []

    def enter(module: nn.Module, _inputs: Any) -> None:
        states[module] = _random_state(model)

    def leave(module: nn.Module, _inputs: Any, _output: Any) -> None:
        if not torch.equal(states[module], _random_state(model)):
            found.append(names[module])

    handles = [module.register_forward_pre_hook(enter) for module in names]
    handles += [module.register_forward_hook(leave) for module in names]
    try:
        _passes_agree(model, random_pairs(model), times=1)
    finally:
        for handle in handles:
            handle.remove()
    return next(iter(found), "")


def random_pairs(
    model: PreTrainedModel, *, lengths: Sequence[tuple[int, int, int]] = ((7, 4, 6), (3, 5, 2))
) -> list[TokenizedPair]:
    """Pairs of random tokens, always the same; two short ones unless other lengths are asked for."""
    generator = torch.Generator("cpu").manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size

    def segment(length: int) -> list[int]:
        ids: list[int] = torch.randint(vocab_size, (length,), generator=generator, device="cpu").tolist()
        return ids

    return [TokenizedPair(*map(segment, of_pair)) for of_pair in lengths]


def _own_log_prob(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> float:
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0].to(torch.float64)
    predicted = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return float(predicted.gather(1, ids[0, len(prompt) :, None]).sum())


def _advice(layout: Layout, packed: bool) -> str:
    if packed:
        return "its attention can't be packed: set datamodule.packed=false"
    if layout == "shared_prefix":
        return "its attention can't share a prompt: set datamodule.layout=concatenated"
    return "this family is not supported"
