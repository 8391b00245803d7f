"""Does this model compute what this project assumes? Two small pairs, before training, against the model's own logits.

A model family may read positions, masks or its head in a way that no flag announces (ALiBi, state-space layers, scaled
heads); then log-probs would be wrong without any error. A check costs six short forwards.
"""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from tiltmeter.batch import Layout, TokenizedPair, collate_pairs
from tiltmeter.errors import UserError
from tiltmeter.layers import sliding_window
from tiltmeter.log_probs import sequence_log_probs
from tiltmeter.packing import use_packed_attention

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest accepted difference of a log-prob, as a share of its size."""


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
    kind = model.device.type
    computed_in = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    if not worst <= _TOLERANCE.get(computed_in, 5e-2):
        raise UserError(
            f"{name} gives other log-probs in {shown} than by its own logits (a relative difference of {worst:.1g}); "
            f"{_advice(layout, packed)}"
        )


def random_pairs(model: PreTrainedModel) -> list[TokenizedPair]:
    """Two short pairs of random tokens, always the same."""
    generator = torch.Generator("cpu").manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size

    def segment(length: int) -> list[int]:
        ids: list[int] = torch.randint(vocab_size, (length,), generator=generator, device="cpu").tolist()
        return ids

    return [TokenizedPair(*map(segment, lengths)) for lengths in ((7, 4, 6), (3, 5, 2))]


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
